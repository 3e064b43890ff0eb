"""Output protection: every command refuses a concurrent run, and never touches foreign files or results."""

import dataclasses
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from raydet.cli.commands import COMMANDS
from raydet.cli.main import main
from raydet.config import EvaluateConfig
from raydet.measuring.evaluate import evaluate
from raydet.models.loading import build_detector
from raydet.tables.kept.columns import KeptVectors
from raydet.tables.output_folder import open_folder
from raydet.tables.schema import Category, build_schema
from raydet.tables.table import TableWriter, open_table
from tests.second_looks.tiny_models import write_model
from tests.small_sets import files_below, rows_of, save_image

_STOPPING = """
import os, signal, sys
from raydet.tables import folder_lock
lock = folder_lock._lock
def stop_once_locked(*arguments):
    folder_lock._lock = lock
    locked = lock(*arguments)
    os.kill(os.getpid(), signal.SIGSTOP)
    return locked
folder_lock._lock = stop_once_locked
from raydet.cli.main import main
sys.exit(main(sys.argv[1:]))
"""
"""A raydet process that stops itself once it has locked its first output, until it receives SIGCONT."""

_STOPPING_WHILE_WRITING = """
import os, signal, sys
from raydet.tables import storage
name, calls = storage.partial_name, []
def stop_at_the_second_name(*arguments):
    calls.append(arguments)
    if len(calls) == 2 or not sys.argv[1].startswith(("prepare", "evaluate", "compare", "inspect", "predict")):
        os.kill(os.getpid(), signal.SIGSTOP)
    return name(*arguments)
storage.partial_name = stop_at_the_second_name
from raydet.cli.main import main
sys.exit(main(sys.argv[1:]))
"""
"""A raydet process that stops itself while it writes: at its second file, or at the only one."""

_ON_A_FULL_DISK = """
import resource, signal, sys
from raydet.cli.main import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)),) * 2)
sys.exit(main(sys.argv[1:]))
"""
"""A raydet process for which every write beyond a size, its first argument, fails as on a full disk."""

FOLDERS = {
    "prepare images": ["--max-pixels", "9999999"],
    "prepare shapes": ["--seed", "3"],
    "inspect": ["--num-images", "1"],
    "evaluate": ["--bootstrap", "4"],
    "compare": ["--bootstrap", "4"],
    "select": ["--min-similarity", "0.9"],
}
"""Commands that write a folder without Ray, each with an option that changes the identity of the run."""
FORMATS = ("coco", "voc", "yolo", "csv", "cvat", "label-studio", "hub", "detections")
"""Formats of `prepare` that share what `prepare images` writes with."""
FOLDERS_OF_FORMATS = {f"prepare {name}": ["--max-pixels", "9999999"] for name in FORMATS}
PLACES = {"export voc": "out", "export yolo": "out", "export coco": "out.json", "export onnx": "out.onnx"}
PLACES |= {"report": "out.html", "export cvat": "out", "export label-studio": "out", "export openvino": "out"}
"""Commands that write their output atomically, each with a valid name for it."""
ON_RAY = ("predict", "train", "tune", "loop")
SLOW = ("crops",)
"""Commands that write as `predict` does."""


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> dict[str, list[str]]:
    """Options of each command, without `--out`."""
    folder = tmp_path_factory.mktemp("inputs")
    for number in range(4):
        save_image(folder / "images" / f"{number}.png", seed=number)
    val, found, model = str(shapes / "val"), str(folder / "found"), str(folder / "model")
    table = open_table(val, "images")
    with TableWriter(found, build_schema("detections", table.categories), config_hash="x") as writer:
        for row in rows_of(val):
            objects = row["objects"]
            detections = {"bbox": objects["bbox"], "category": objects["category"], "score": [0.5] * len(objects["id"])}
            writer.write_rows(
                [{**{key: row[key] for key in ("image_id", "width", "height")}, "detections": detections}]
            )
    vectors = str(folder / "vectors")
    with TableWriter(vectors, KeptVectors(dimension=2).schema(table.categories, {}), config_hash="x") as writer:
        for row in rows_of(val):
            sizes = {key: row[key] for key in ("image_id", "width", "height")}
            writer.write_rows([{**sizes, "path": row["image"]["path"], "image_embedding": [1.0, row["image_id"] % 3]}])
    for name, out in (
        ("voc", "voc"),
        ("yolo", "yolo"),
        ("cvat", "cvat"),
        ("label-studio", "ls"),
        ("coco", "coco.json"),
    ):
        assert main(["export", name, "--data", val, "--out", str(folder / out)]) == 0
    pictures = str(folder / "cvat" / "images")
    rows = [f"{row['image']['path']},64,64,thing,1,2,30,40" for row in rows_of(val)]
    lines = ["filename,width,height,class,xmin,ymin,xmax,ymax", *rows]
    (folder / "boxes.csv").write_text("\n".join(lines))
    build_detector("conditional_detr_tiny", table.categories, image_size=64, seed=0).save(model)
    evaluate(EvaluateConfig(truth=val, detections=found, out=str(folder / "metrics"), bootstrap=3))
    train = {"train_data": str(shapes / "train"), "val_data": val, "model": "rt_detr_v2_tiny", "image_size": 64}
    train |= {"epochs": 1, "threads_per_worker": 1, "log_images": 0}
    search = {
        "train_config": train,
        "space": {"learning_rate": {"uniform": [1e-4, 1e-3]}},
        "num_trials": 1,
        "search": "random",
    }
    rounds = {
        **{name: train[name] for name in ("train_data", "val_data")},
        "checkpoint": model,
        "unlabelled": train["train_data"],
        "truth": val,
        "rounds": 1,
        "labels": {"threshold": 1e-6},
        "train": {name: value for name, value in train.items() if name not in ("train_data", "val_data", "model")},
        "evaluate": {"bootstrap": 3},
    }
    vit = write_model("vit", folder / "vit")
    for name, content in (("train", train), ("tune", search), ("loop", rounds)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return {
        "prepare images": ["--images", str(folder / "images")],
        "prepare shapes": ["--num-train", "8", "--num-val", "3", "--image-size", "64"],
        "prepare coco": ["--annotations", str(folder / "coco.json"), "--images", pictures],
        "prepare voc": ["--annotations", f"{folder}/voc/Annotations", "--images", f"{folder}/voc/JPEGImages"],
        "prepare yolo": ["--data", str(folder / "yolo" / "data.yaml"), "--split", "train"],
        "prepare csv": ["--annotations", str(folder / "boxes.csv"), "--images", pictures],
        "prepare cvat": ["--annotations", str(folder / "cvat" / "annotations.xml"), "--images", pictures],
        "prepare label-studio": ["--annotations", str(folder / "ls" / "tasks.json"), "--images", pictures],
        "prepare hub": ["--dataset", val],
        "prepare detections": ["--detections", found, "--data", val, "--threshold", "0.4"],
        "inspect": ["--data", val, "--augmentation", "none", "--num-images", "0"],
        "evaluate": ["--truth", val, "--detections", found, "--bootstrap", "3"],
        "compare": ["--truth", val, "--first", found, "--second", found, "--bootstrap", "3"],
        "select": ["--detections", vectors, "--near-duplicates", "--min-similarity", "0.99"],
        "report": ["--metrics", str(folder / "metrics"), "--num-images", "1"],
        "export voc": ["--data", val],
        "export yolo": ["--data", val],
        "export coco": ["--data", val],
        "export cvat": ["--data", val],
        "export label-studio": ["--data", val],
        "export onnx": ["--checkpoint", model],
        "export openvino": ["--checkpoint", model],
        "predict": ["--checkpoint", model, "--data", val],
        "crops": ["--detections", found, "--data", val, "--model", vit, "--task", "image-classification"],
        "train": ["--config", str(folder / "train.yaml")],
        "tune": ["--config", str(folder / "tune.yaml")],
        "loop": ["--config", str(folder / "loop.yaml")],
    }


@pytest.fixture
def run(options: dict[str, list[str]], capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """A function that runs a command in this process and returns its exit code and its stderr."""

    def run_command(command: str, out: Path, *more: str) -> tuple[int, str]:
        capsys.readouterr()
        code = main([*command.split(), *options[command], *more, "--out", str(out)])
        return code, capsys.readouterr().err.strip()

    return run_command


Run = Callable[..., tuple[int, str]]


def start_and_stop(command: str, options: list[str], out: Path, script: str = _STOPPING) -> "subprocess.Popen[str]":
    """Start a command, and return once it has locked its output, or begun to write, and stopped."""
    arguments = [sys.executable, "-c", script, *command.split(), *options, "--out", str(out)]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    _wait_until_stopped(process)
    return process


def _wait_until_stopped(process: "subprocess.Popen[str]") -> None:
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status), (
        f"the command exited with {os.waitstatus_to_exitcode(status)} before it locked its output"
    )


def assert_refused(answer: tuple[int, str], *words: str) -> None:
    code, error = answer
    assert code == 2 and "\n" not in error, error
    for word in words:
        assert word in error, error


def _slow(*commands: str) -> list[Any]:
    return [pytest.param(command, marks=pytest.mark.slow) for command in commands]


GRAPHS = ("export onnx", "export openvino")
LIGHT = (*FOLDERS, *(name for name in PLACES if name not in GRAPHS))
HEAVY = (*GRAPHS, "predict", "crops")
"""Commands that import torch, and that end within seconds without Ray."""


def test_every_command_that_writes_is_listed_here() -> None:
    names = {name: {item.name for item in dataclasses.fields(command.config)} for name, command in COMMANDS.items()}
    writing = {name for name, options in names.items() if "out" in options}
    # `demo` calls the others.
    assert writing == {*FOLDERS, *FOLDERS_OF_FORMATS, *PLACES, *ON_RAY, *SLOW, "demo"}


@pytest.mark.parametrize("command", [*LIGHT, *_slow(*GRAPHS, *FOLDERS_OF_FORMATS)])
def test_a_second_run_is_refused_and_the_first_is_whole(
    command: str, options: dict[str, list[str]], tmp_path: Path, run: Run
) -> None:
    out, alone = tmp_path / "both" / PLACES.get(command, "out"), tmp_path / "alone" / PLACES.get(command, "out")
    process = start_and_stop(command, options[command], out)
    assert_refused(run(command, out), "--out", "another run", command.split()[0])
    os.kill(process.pid, signal.SIGCONT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert run(command, alone)[0] == 0
    # The same files as those of an undisturbed run, and neither locks nor partial files.
    assert files_below(out.parent) == files_below(alone.parent)
    assert not [name for name in files_below(tmp_path) if "lock" in name or "partial" in name]
    for name in files_below(out.parent):
        if name.endswith((".parquet", ".json", ".xml", ".txt")) and not _depends_on_run(name):
            assert (out.parent / name).read_bytes() == (alone.parent / name).read_bytes(), name


def _depends_on_run(name: str) -> bool:
    """Return True for files that contain the folder or the time of their run, or OpenVINO's numbers for its nodes."""
    file = name.rpartition("/")[2]
    return file.startswith(".") or "/runs/" in name or file in ("model.xml", "raydet.json")


@pytest.mark.parametrize("command", [*ON_RAY, *_slow(*SLOW)])
def test_a_second_run_on_ray_is_refused_before_ray_starts(
    command: str, options: dict[str, list[str]], tmp_path: Path, run: Run
) -> None:
    out = tmp_path / "out"
    process = start_and_stop(command, options[command], out)
    try:
        assert_refused(run(command, out), "--out", "another run", command)
    finally:
        process.kill()
        process.communicate()
    # The lock of a killed process is released.
    with open_folder(str(out), command=command) as folder:
        assert folder.record() is None


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("command", [*ON_RAY, *_slow(*SLOW)])
def test_the_first_run_on_ray_is_whole(command: str, options: dict[str, list[str]], tmp_path: Path, run: Run) -> None:
    out = tmp_path / "out"
    process = start_and_stop(command, options[command], out)
    assert_refused(run(command, out), "--out", "another run")
    os.kill(process.pid, signal.SIGCONT)
    _, errors = process.communicate(timeout=500)
    assert process.returncode == 0, errors
    assert run(command, out) == (0, "")  # already finished
    assert not [name for name in files_below(out) if name.endswith((".lock", ".partial"))]


@pytest.mark.parametrize("command", [*FOLDERS, *ON_RAY, *_slow(*SLOW)])
def test_files_of_others_are_refused_and_left(command: str, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "out"
    mine = out / ("val" if command == "prepare shapes" else ".") / "holiday.jpg"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    assert_refused(run(command, out), "--out", "holiday.jpg")
    assert files_below(out) == [str(mine.relative_to(out))] and mine.read_text() == "mine"


@pytest.mark.parametrize("command", [*FOLDERS, *_slow(*FOLDERS_OF_FORMATS)])
def test_another_run_is_refused_with_the_same_words(command: str, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "out"
    assert run(command, out)[0] == 0
    before = {name: (out / name).read_bytes() for name in files_below(out)}
    other = (FOLDERS | FOLDERS_OF_FORMATS)[command]
    assert_refused(run(command, out, *other), "another run", *other)
    assert {name: (out / name).read_bytes() for name in files_below(out)} == before
    assert run(command, out)[0] == 0  # repeating the same run is allowed


@pytest.mark.parametrize("command", [*FOLDERS, *PLACES, *ON_RAY, *_slow(*FOLDERS_OF_FORMATS, *SLOW)])
@pytest.mark.parametrize("kind", ["http", "below a file", "linked lock", "a long name", "a NUL"])
def test_places_that_cannot_be_written_are_one_line(command: str, kind: str, tmp_path: Path, run: Run) -> None:
    name, victim = PLACES.get(command, "out"), tmp_path / "victim"
    victim.write_text("precious")
    out: Any = tmp_path / "victim" / name if kind == "below a file" else tmp_path / name
    if kind == "a long name":
        out = tmp_path / f"{'n' * 300}{name}"
    if kind == "a NUL":
        out = tmp_path / f"a\0{name}"
    if kind == "http":
        out = f"http://127.0.0.1:9/{name}"
    if kind == "linked lock":
        lock = tmp_path / f".{name}.lock" if command in PLACES else out / ".lock"
        if command == "prepare shapes":
            lock = out / "train" / ".lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        lock.symlink_to(victim)
    assert_refused(run(command, out), "--out")
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("command", [*FOLDERS, *PLACES, *ON_RAY, *_slow(*FOLDERS_OF_FORMATS, *SLOW)])
def test_a_place_without_rights_is_one_line_and_exit_code_1(command: str, tmp_path: Path, run: Run) -> None:
    folder = Path("/sys")  # not even root may create files there
    if os.geteuid() != 0:
        folder = tmp_path / "read-only"
        folder.mkdir(mode=0o555)
    code, error = run(command, folder / PLACES.get(command, "raydet-out"))
    assert code == 1 and error.count("raydet: error") == 1 and "\n" not in error, error


@pytest.fixture
def full_disk() -> Iterator[Callable[[int], None]]:
    """A function that makes every write of this process beyond a size fail, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def fill(most_bytes: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, before[1]))

    yield fill
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("most_bytes", [0, 1000])
@pytest.mark.parametrize("command", [*LIGHT, *_slow(*FOLDERS_OF_FORMATS)])
def test_a_full_disk_is_one_line_and_leaves_nothing_that_looks_whole(
    command: str, most_bytes: int, tmp_path: Path, run: Run, full_disk: Callable[[int], None]
) -> None:
    out = tmp_path / PLACES.get(command, "out")
    _leave_earlier(out)
    full_disk(most_bytes)
    code, error = run(command, out)
    full_disk(resource.RLIM_INFINITY)
    _assert_nothing_looks_whole(command, most_bytes, out, code, error)
    assert run(command, out)[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize("most_bytes", [0, 1000])
@pytest.mark.parametrize("command", HEAVY)
def test_a_full_disk_in_a_process_of_its_own(
    command: str, most_bytes: int, options: dict[str, list[str]], tmp_path: Path
) -> None:
    out = tmp_path / PLACES.get(command, "out")
    words = [*command.split(), *options[command], "--out", str(out)]
    limited = [sys.executable, "-c", _ON_A_FULL_DISK, str(most_bytes), *words]
    _leave_earlier(out)
    ended = subprocess.run(limited, capture_output=True, text=True, timeout=120)
    _assert_nothing_looks_whole(command, most_bytes, out, ended.returncode, ended.stderr.strip())
    again = subprocess.run([sys.executable, "-m", "raydet", *words], capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr


def _leave_earlier(out: Path) -> None:
    if out.suffix:
        out.write_text("earlier")


def _assert_nothing_looks_whole(command: str, most_bytes: int, out: Path, code: int, error: str) -> None:
    if code == 0:  # its only files were small enough
        assert most_bytes and command in PLACES
        return
    assert code == 1 and error.count("raydet: error") == 1 and "\n" not in error, error
    assert not out.suffix or out.read_text() == "earlier"
    left = set(files_below(out.parent)) - {out.name}
    looking_whole = (".partial", ".lock", ".html", ".onnx", ".json")
    assert not [name for name in left if name.endswith(looking_whole) and ".run" not in name and ".job" not in name]


@pytest.mark.slow
@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("command", [*LIGHT, *FOLDERS_OF_FORMATS, *HEAVY])
def test_a_command_ended_while_it_writes_leaves_nothing_that_looks_whole(
    command: str, ending: signal.Signals, options: dict[str, list[str]], tmp_path: Path, run: Run
) -> None:
    out = tmp_path / "ended" / PLACES.get(command, "out")
    process = start_and_stop(command, options[command], out, _STOPPING_WHILE_WRITING)
    process.send_signal(ending)
    process.send_signal(signal.SIGCONT)
    _, errors = process.communicate(timeout=60)
    expected = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}
    assert process.returncode == expected[ending], errors
    assert errors.count("\n") == (ending != signal.SIGKILL) and "Traceback" not in errors, errors
    assert run(command, out)[0] == 0
    assert run(command, tmp_path / "alone" / out.name)[0] == 0
    assert files_below(out.parent) == files_below(tmp_path / "alone")


def test_files_and_folders_follow_the_umask(options: dict[str, list[str]], tmp_path: Path, run: Run) -> None:
    for umask in (0o022, 0o027):
        before = os.umask(umask)
        try:
            for command in LIGHT:
                out = tmp_path / f"{umask:o}" / command / PLACES.get(command, "out")
                assert run(command, out)[0] == 0
            detector = build_detector("rt_detr_v2_tiny", [Category(1, "dog")], image_size=64, seed=0)
            detector.save(str(tmp_path / f"{umask:o}" / "checkpoint"))
        finally:
            os.umask(before)
        for path in (tmp_path / f"{umask:o}").rglob("*"):
            wanted = (0o777 if path.is_dir() else 0o666) & ~umask
            assert path.stat().st_mode & 0o777 == wanted, f"{path}: {path.stat().st_mode & 0o777:o}"

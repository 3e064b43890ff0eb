import ast
import dataclasses
import importlib
import inspect
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from raydet.common.errors import UserError
from raydet.common.redaction import without_secrets
from raydet.tables import storage
from raydet.training.history import EpochRecord, ValidationRecord
from raydet.training.tracking.integrations import _MODULES, Arguments, check_trackers
from raydet.training.tracking.trackers import RunTracker, scalars_of
from tests.environments import run_with

SECRET = "s3cr3t-value-of-a-key"
CONFIG: dict[str, Any] = {
    "model": "rt_detr_v2_small",
    "epochs": 3,
    "train_data": f"s3://user:{SECRET}@bucket/train",
    "augmentation": [{"HorizontalFlip": {"p": 0.5}}],
}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Remove the variables that a tracker sets for its process, before and after the test."""
    saved = dict(os.environ)
    for name in list(os.environ):
        if name.startswith(("MLFLOW_", "WANDB_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("SOME_API_KEY", SECRET)
    yield
    os.environ.clear()
    os.environ.update(saved)


def started(out: str, trackers: list[str], *, start_step: int = 0, **options: Any) -> RunTracker:
    config = CONFIG | options.pop("changes", {})
    return RunTracker(out, trackers, config, start_step=start_step, steps_per_epoch=2, **options)


def picture(colour: int = 200) -> npt.NDArray[np.uint8]:
    made = np.zeros((40, 60, 3), np.uint8)
    made[:, 30:] = colour
    return made


def read_events(folder: str) -> Iterator[Any]:
    """Yield the events of all files of a folder or URI, in the order in which TensorBoard reads them."""
    from tensorboardX.proto.event_pb2 import Event

    for name in storage.list_files(folder):
        content, position = storage.read_bytes(f"{folder}/{name}"), 0
        while position < len(content):
            (length,) = struct.unpack_from("<Q", content, position)
            yield Event.FromString(content[position + 12 : position + 12 + length])
            position += 12 + length + 4


def shown(folder: str) -> dict[str, list[tuple[int, Any]]]:
    """Return steps and values by tag; the start of a session hides earlier values from its step on."""
    found: dict[str, list[tuple[int, Any]]] = {}
    for event in read_events(folder):
        if event.HasField("session_log") and event.session_log.status == event.session_log.START:
            found = {tag: [entry for entry in entries if entry[0] < event.step] for tag, entries in found.items()}
        for value in event.summary.value:
            content = value.image if value.HasField("image") else value.simple_value
            found.setdefault(value.tag, []).append((event.step, content))
    return found


def everything_below(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def test_an_entry_of_the_history_becomes_tags_in_groups() -> None:
    record = EpochRecord(
        epoch=2,
        loss=1.5,
        losses={"loss_bbox": 0.5, "loss_vfl": 1.0},
        learning_rate=1e-4,
        images_per_s=80.0,
        seconds=10.0,
        step_s={"data": 0.1, "compute": 0.2},
        validation=ValidationRecord(
            numbers={"AP": 0.25, "APs": None},
            ap_by_class={"cat": 0.5, "dog": None, "bus/coach": 0.1},
            seconds=3,
        ),
    )
    assert scalars_of(record) == {
        "train/epoch": 2.0,
        "train/loss": 1.5,
        "train/loss_bbox": 0.5,
        "train/loss_vfl": 1.0,
        "train/gradient_norm": 0.0,
        "train/learning_rate": 1e-4,
        "train/skipped_steps": 0.0,
        "train/unreadable": 0.0,
        "time/images_per_s": 80.0,
        "time/seconds": 10.0,
        "time/start_s": 0.0,
        "time/step_data_s": 0.1,
        "time/step_compute_s": 0.2,
        "validation/AP": 0.25,
        "AP_by_class/cat": 0.5,
        "AP_by_class/bus_coach": 0.1,
        "time/validation_s": 3.0,
        "validation/unreadable": 0.0,
    }


def test_secrets_are_replaced_and_nothing_else() -> None:
    config = {
        "api_key": "abc",
        "token": None,
        "nested": [{"hub_token": "abc", "path": f"/data/{SECRET}/x"}],
        "uri": "https://user:pw@host/a?X-Amz-Signature=abc&part=2",
        "model": "hf_abcdefghijklmnopqrstuvwxyz",
        "tokenizer": "kept",
        "epochs": 3,
        "data": "s3://bucket/train",
    }
    assert without_secrets(config) == {
        "api_key": "***",
        "token": None,
        "nested": [{"hub_token": "***", "path": "/data/***/x"}],
        "uri": "https://host/a",
        "model": "***",
        "tokenizer": "kept",
        "epochs": 3,
        "data": "s3://bucket/train",
    }


def test_a_tracker_that_is_not_there_is_told_of_without_importing_any(tmp_path: Path) -> None:
    check_trackers([])
    check_trackers(["mlflow", "wandb", "kubeflow", "transformers:TrainerCallback"])
    for name, facts in {
        "trackio": "requires trackio; run: pip install trackio",
        "azure_ml": "run: pip install azureml-core",
        "tensorboard": "does not support tensorboard; use azure_ml, clearml, .* or MODULE:CLASS",
        "raydet:NoSuchCallback": "cannot import raydet:NoSuchCallback",
        "no_such_module:Callback": "cannot import no_such_module:Callback",
        "raydet:train": "is not a class",
    }.items():
        with pytest.raises(UserError, match=facts):
            check_trackers([name])
    (tmp_path / "wandb").mkdir()  # W&B creates such a folder; Python takes it for a namespace package
    code = (
        "import sys; from raydet.training.tracking.integrations import check_trackers, UserError\n"
        f"sys.path[:] = [{str(tmp_path)!r}]\n"
        "try: check_trackers(['wandb'])\n"
        "except UserError as error: print(error)\n"
        "print(sorted({'mlflow', 'wandb', 'tensorboardX', 'torch', 'transformers', 'ray'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    message, imported = done.stdout.splitlines()
    assert "pip install 'raydet[wandb]'" in message and imported == "[]"


EVENTS = ("on_init_end", "on_train_begin", "on_step_end", "on_log", "on_train_end")
"""Events of callbacks that raydet reports."""


def test_callbacks_of_transformers_find_what_they_read() -> None:
    """The packages of most integrations are not installed here, so their source is checked."""
    from transformers import TrainerControl, TrainerState
    from transformers.integrations import integration_utils

    callbacks = {
        name: made for name, made in integration_utils.INTEGRATION_TO_CALLBACK.items() if name != "tensorboard"
    }
    assert set(callbacks) == set(_MODULES)
    arguments = Arguments({}, "out", "run")
    state, control = TrainerState(), TrainerControl()
    given = {"args": arguments, "training_args": arguments, "state": state, "control": control}
    classes = {made.__name__ for made in callbacks.values()}
    read = {
        (node.value.id, node.attr)
        for part in ast.parse(inspect.getsource(integration_utils)).body
        if isinstance(part, ast.ClassDef) and part.name in classes
        for node in ast.walk(part)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in given
    }
    assert {("args", "to_dict"), ("args", "trackio_space_id"), ("state", "global_step")} <= read
    assert [item for item in sorted(read) if not hasattr(given[item[0]], item[1])] == []
    assert dataclasses.is_dataclass(arguments)  # ClearML reads its fields
    for made in callbacks.values():
        for event in EVENTS:
            more: dict[str, Any] = {"logs": {}} if event == "on_log" else {}
            inspect.signature(getattr(made, event)).bind(None, arguments, state, control, model=None, **more)
        unused = {event for event in vars(made) if event.startswith("on_")} - set(EVENTS)
        assert unused <= {"on_save", "on_predict", "on_evaluate", "on_push_begin"}, made  # of models and of `Trainer`


CALLBACK = """
from transformers import TrainerCallback

seen = []

class Recorder(TrainerCallback):
    def on_train_begin(self, args, state, control, **_):
        seen.append(("begin", args.to_dict()["model"], state.global_step, state.max_steps, state.is_world_process_zero))

    def on_log(self, args, state, control, logs, **_):
        seen.append((state.global_step, state.epoch, logs))

    def on_train_end(self, args, state, control, **_):
        seen.append("end")

class Failing(Recorder):
    def on_log(self, args, state, control, logs, **_):
        seen.append("failing")
        raise ConnectionError(f"no answer from https://me:password@host\\n{args.run_name}")

class NotStarting(Recorder):
    def on_train_begin(self, args, state, control, **_):
        raise SystemError("no key")
"""


def test_callbacks_of_the_user_are_driven_and_their_failures_told_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_trackers.py").write_text(CALLBACK)
    monkeypatch.syspath_prepend(tmp_path)
    names = [f"my_trackers:{name}" for name in ("Failing", "NotStarting", "Recorder")]
    check_trackers(names)
    warnings: list[str] = []
    tracker = started(str(tmp_path / "my-run"), names, start_step=2, warn=warnings.append)
    tracker.scalars(3, {"train/loss": 0.5, "validation/AP": 0.25, "AP_by_class/cat": 0.125, "time/seconds": 2.0})
    tracker.images(4, {"validation/7": picture()})
    tracker.scalars(4, {"step/loss": 1.0, "learning_rate/head": 0.1})
    tracker.close()

    seen = importlib.import_module("my_trackers").seen
    begin = ("begin", "rt_detr_v2_small", 2, 6, True)
    logs = {"loss": 0.5, "eval_AP": 0.25, "eval_AP_by_class/cat": 0.125, "time/seconds": 2.0}
    assert seen == [
        begin,
        begin,
        "failing",
        (3, 1.5, logs),
        (4, 2.0, {"step/loss": 1.0, "learning_rate/head": 0.1}),
        "end",
        "end",
    ]
    assert len(warnings) == 2 and "my_trackers:NotStarting" in warnings[0] and "no key" in warnings[0]
    assert "my_trackers:Failing" in warnings[1] and "training continues" in warnings[1]
    assert "password" not in warnings[1] and "my-run" in warnings[1]
    assert [step for step, _ in shown(str(tmp_path / "my-run" / "log" / "tensorboard"))["step/loss"]] == [4]


def test_tensorboard_shows_each_step_once_after_a_crash(tmp_path: Path) -> None:
    folder = str(tmp_path / "log" / "tensorboard")
    first = started(str(tmp_path), [], start_step=0)
    for step in (1, 2, 3):
        first.scalars(step, {"train/loss": 1 / step, "train/rate": step * 10.0})
    first.images(2, {"validation/7": picture(90)})
    first.images(3, {"validation/7": picture(90)})
    first.flush()  # no close: the process was killed, and its last state is that after step 2
    assert [step for step, _ in shown(folder)["train/loss"]] == [1, 2, 3]

    second = started(str(tmp_path), [], start_step=2)
    second.scalars(3, {"train/loss": 7.0})
    second.scalars(4, {"train/loss": 8.0})
    second.images(4, {"validation/7": picture(200)})
    second.close()
    assert len(storage.list_files(folder)) == 2
    found = shown(folder)
    assert found["train/loss"] == [(1, 1.0), (2, 0.5), (3, 7.0), (4, 8.0)]
    assert found["train/rate"] == [(1, 10.0), (2, 20.0)]
    assert [step for step, _ in found["validation/7"]] == [2, 4]
    image = found["validation/7"][1][1]
    assert (image.height, image.width) == (40, 60)
    decoded = np.asarray(Image.open(BytesIO(image.encoded_image_string)))
    np.testing.assert_allclose(decoded, picture(200), atol=12)
    assert b"rt_detr_v2_small" in everything_below(tmp_path)
    assert SECRET.encode() not in everything_below(tmp_path)


def test_what_is_logged_arrives_at_a_uri_with_each_flush() -> None:
    out = "memory://tracked/run"
    folder = f"{out}/log/tensorboard"
    tracker = started(out, [], start_step=0)
    tracker.scalars(1, {"train/loss": 0.5})
    tracker.flush()
    assert shown(folder)["train/loss"] == [(1, 0.5)]
    tracker.scalars(2, {"train/loss": 0.25})
    tracker.close()
    assert shown(folder)["train/loss"] == [(1, 0.5), (2, 0.25)]
    resumed = started(out, [], start_step=1)
    resumed.scalars(2, {"train/loss": 0.125})
    resumed.close()
    assert shown(folder)["train/loss"] == [(1, 0.5), (2, 0.125)]


def test_a_place_that_cannot_be_written_is_told_of_once(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("a file where a folder should be")
    warnings: list[str] = []
    tracker = started(str(tmp_path), [], start_step=0, warn=warnings.append)
    tracker.scalars(1, {"train/loss": 0.5})
    tracker.images(1, {"validation/7": picture()})
    tracker.flush()
    tracker.close()
    assert len(warnings) == 1 and "tensorboard" in warnings[0] and "training continues" in warnings[0]


def test_mlflow_continues_in_the_same_run(tmp_path: Path) -> None:
    out, folder = str(tmp_path / "my-run"), tmp_path / "my-run" / "log" / "mlflow"
    warnings: list[str] = []
    first = started(out, ["mlflow"], warn=warnings.append)
    first.scalars(1, {"train/loss": 0.5, "AP_by_class/traffic (light)": 0.25})
    first.images(1, {"validation/7": picture()})
    first.close()
    second = started(out, ["mlflow"], start_step=1, changes={"epochs": 5}, warn=warnings.append)
    second.scalars(2, {"train/loss": 0.25})
    second.close()
    assert warnings == []

    from mlflow.tracking import MlflowClient

    client = MlflowClient(folder.as_uri())
    experiment = client.get_experiment_by_name("raydet")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("my-run", "FINISHED")
    assert run.info.run_id == json.loads((folder.parent / "trackers.json").read_text())["mlflow"]
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(metric.step, metric.value) for metric in history] == [(1, 0.5), (2, 0.25)]
    assert run.data.metrics["eval_AP_by_class/traffic _light_"] == 0.25
    assert run.data.params["epochs"] == "3" and run.data.params["train_data"] == "s3://bucket/train"
    assert client.list_artifacts(run.info.run_id) == []
    assert SECRET.encode() not in everything_below(tmp_path)


def test_mlflow_files_at_a_uri_are_taken_up_again(monkeypatch: pytest.MonkeyPatch) -> None:
    out = "memory://tracked/mlflow-run"
    for start_step in (0, 1):
        tracker = started(out, ["mlflow"], start_step=start_step)
        tracker.scalars(start_step + 1, {"train/loss": 0.5})
        tracker.close()
        for name in ("MLFLOW_TRACKING_URI", "MLFLOW_MAX_LOG_PARAMS"):  # like a new process
            monkeypatch.delenv(name, raising=False)
    names = storage.list_files(f"{out}/log/mlflow", recursive=True)
    (run_id,) = {name.split("/")[1] for name in names if name.count("/") > 1}
    assert json.loads(storage.read_bytes(f"{out}/log/trackers.json"))["mlflow"] == run_id
    (losses,) = [name for name in names if name.endswith("metrics/loss")]
    lines = storage.read_bytes(f"{out}/log/mlflow/{losses}").decode().splitlines()
    assert [line.split()[1:] for line in lines] == [["0.5", "1"], ["0.5", "2"]]


def test_wandb_without_a_key_is_logged_to_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "my-run"
    warnings: list[str] = []
    for start_step in (0, 1):
        tracker = started(str(out), ["wandb"], start_step=start_step, warn=warnings.append)
        tracker.scalars(start_step + 1, {"train/loss": 0.5, "validation/AP": 0.25})
        tracker.images(start_step + 1, {"validation/7": picture()})
        tracker.close()
        monkeypatch.setenv("WANDB_API_KEY", key := "0123456789abcdef" * 3)
        monkeypatch.setenv("WANDB_MODE", "offline")
    assert warnings == []
    run_id = json.loads((out / "log" / "trackers.json").read_text())["id"]
    files = sorted((out / "log" / "wandb").glob(f"offline-run-*/run-{run_id}.wandb"))
    assert len(files) == 2
    for file in files:
        content = file.read_bytes()
        assert all(name in content for name in (b"rt_detr_v2_small", b"train/loss", b"eval/AP", b"my-run"))
        assert len(list(file.parent.glob("files/media/images/eval/*.png"))) == 1
    assert SECRET.encode() not in everything_below(tmp_path)
    assert key.encode() not in everything_below(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["my-run"]


@pytest.mark.slow
def test_trackio_logs_to_its_folder_without_a_server(tmp_path: Path) -> None:
    """Trackio needs an older Pillow, so it has an environment of its own."""
    script = f"""
import os
seen = []
sys.addaudithook(lambda event, _: seen.append(event) if event in ("socket.connect", "socket.listen") else None)
import numpy as np
from raydet.training.tracking.integrations import check_trackers
from raydet.training.tracking.trackers import RunTracker

check_trackers(["trackio"])
for start_step in (0, 1):
    tracker = RunTracker(
        sys.argv[1], ["trackio"], {CONFIG!r}, start_step=start_step, steps_per_epoch=2, warn=seen.append
    )
    tracker.scalars(start_step + 1, {{"train/loss": 0.5, "validation/AP": 0.25 + start_step, "AP_by_class/cat": 0.125}})
    tracker.images(start_step + 1, {{"validation/7": np.full((40, 60, 3), 90, np.uint8)}})
    tracker.close()
from trackio.sqlite_storage import SQLiteStorage
runs = {{run: SQLiteStorage.get_logs("raydet", run) for run in SQLiteStorage.get_runs("raydet")}}
print(json.dumps([runs, SQLiteStorage.get_run_config("raydet", "my-run"), seen]))
"""
    out = tmp_path / "my-run"
    environment = tmp_path / "environment"
    environment.mkdir()
    runs, config, seen = run_with(
        "trackio>=0.21.1", script, environment, cwd=tmp_path, arguments=[str(out)], with_project=True
    )
    assert seen == [] and list(runs) == ["my-run"]
    assert config["model"] == "rt_detr_v2_small" and config["epochs"] == 3
    numbers = [entry for entry in runs["my-run"] if "train/loss" in entry]
    assert [
        (entry["train/global_step"], entry["train/loss"], entry["eval/AP"], entry["eval/AP_by_class/cat"])
        for entry in numbers
    ] == [(1, 0.5, 0.25, 0.125), (2, 0.5, 1.25, 0.125)]
    images = [entry["eval/7"]["file_path"] for entry in runs["my-run"] if "eval/7" in entry]
    assert len(images) == 2 and all((out / "log" / "trackio" / "media" / image).is_file() for image in images)
    assert SECRET.encode() not in everything_below(out)

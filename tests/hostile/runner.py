"""A process that has imported raydet once and forks for every case.

For each case a keeper is forked, which builds the data, forks again for the command itself, waits for it with a
deadline, and judges what it sees. So nothing hostile is ever opened in the process that forks.
"""

import atexit
import contextlib
import importlib
import json
import os
import resource
import select
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import psutil

from tests.hostile import rights
from tests.hostile.case import Case, Scene
from tests.hostile.judge import HUB_PORT, Ended, Verdict, judge, snapshot

CPU_S = 60
"""Limit of the processor time of a command."""
ADDRESS_SPACE = 3 * 2**30
"""Address space that a command may map in addition to that of the process that forked it."""
_FILE_BYTES = 4 * 2**30
_JUDGING_S = 60
_PATIENCE_S = 5
"""Time for the processes that a command has started to end after it."""
_ENVIRONMENT = {
    "HF_ENDPOINT": f"http://127.0.0.1:{HUB_PORT}",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "NO_ALBUMENTATIONS_UPDATE": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
_WEB_LIMITS_S = {"connect_timeout_s": 2.0, "silence_timeout_s": 3.0, "total_timeout_s": 8.0, "longest_wait_s": 1.0}
"""Limits of `WebReader` in the cases, a fraction of the real ones."""
IMPORTS = {
    "light": (
        "raydet.cli.main",
        "raydet.cluster.forecast.plan",
        "raydet.exports.coco",
        "raydet.exports.cvat",
        "raydet.exports.label_studio",
        "raydet.exports.voc",
        "raydet.exports.yolo",
        "raydet.inspection.inspect",
        "raydet.measuring.compare",
        "raydet.measuring.evaluate",
        "raydet.preparation.prepare",
        "raydet.reporting.report",
        "datasets",
        "jinja2",
        "jsonargparse",
        "plotly",
    ),
    "heavy": (
        "raydet.exports.hub",
        "raydet.exports.onnx",
        "raydet.inspection.inspect",
        "raydet.models.loading",
        "raydet.scoring.local",
        "raydet.scoring.predict",
        "raydet.training.train",
        "raydet.tuning.tune",
        "transformers.models.rt_detr_v2.modeling_rt_detr_v2",
        "transformers.models.rt_detr.image_processing_rt_detr",
        "albumentations",
    ),
    "ray": ("raydet.training.train", "raydet.tuning.tune", "raydet.preparation.on_ray", "raydet.scoring.distributed"),
}
"""Modules that are imported before forking, by weight of the case."""


def run(cases: Iterable[Case], base: Path, *, num_at_once: int = 2, keep: Path | None = None) -> Iterator[Verdict]:
    """Run cases and yield their verdicts in the order in which they end.

    Args:
        cases: Cases of one weight.
        base: Good data sets, made by `base.make`.
        num_at_once: Cases at the same time.
        keep: Folder where those with faults are kept.
    """
    os.environ |= _ENVIRONMENT
    os.environ.pop("RAY_ADDRESS", None)
    waiting = iter(cases)
    running: dict[int, tuple[Case, Path]] = {}
    number = 0
    with temporary_folder("hs-") as place:
        os.environ.setdefault("HF_HOME", str(place / "hf"))
        while True:
            while len(running) < num_at_once and (case := next(waiting, None)) is not None:
                for module in IMPORTS[case.weight]:
                    importlib.import_module(module)
                number += 1
                root = place / f"{number:05d}"
                pid = _fork()
                if pid == 0:
                    _keep_case(case, root, base)
                running[pid] = (case, root)
            if not running:
                return
            pid, status = os.wait()
            case, root = running.pop(pid)
            verdict = _verdict_of(case, root, status)
            if keep is not None and verdict.faults and root.exists():
                shutil.move(root, keep / root.name)
                verdict.faults.append(f"kept in {keep / root.name}")
            shutil.rmtree(root, ignore_errors=True)
            yield verdict


@contextlib.contextmanager
def temporary_folder(prefix: str) -> Iterator[Path]:
    """Context manager: a folder that this process removes; `TemporaryDirectory` lets forked ones remove it too."""
    folder = Path(tempfile.mkdtemp(prefix=prefix))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _fork() -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    return os.fork()


def _verdict_of(case: Case, root: Path, status: int) -> Verdict:
    try:
        return Verdict(**json.loads((root / "verdict.json").read_text()))
    except (OSError, ValueError):
        reason = (root / "keeper.txt").read_text() if (root / "keeper.txt").exists() else f"wait status {status}"
        return Verdict(case.name, "broken", [f"the harness itself failed: {reason[-1500:]}"])


def _keep_case(case: Case, root: Path, base: Path) -> NoReturn:
    """Build, run and judge one case; write root/verdict.json."""
    companions: list[int] = []
    try:
        rights.adopt_orphans()
        scene = Scene(root, base)
        command = case.build(scene)
        for function in scene.beside:
            pid = _fork()
            if pid == 0:
                with contextlib.suppress(BaseException):
                    function()
                os._exit(0)
            companions.append(pid)
        if case.rights == "reader":
            for folder in (root, scene.made, scene.home, scene.temporary, scene.here):
                folder.chmod(0o777)
        before = snapshot(scene)
        pid = _fork()
        if pid == 0:
            _run_command(case, scene, command)
        ended = _wait(pid, scene, case.seconds, companions)
        for companion in companions:
            os.kill(companion, signal.SIGKILL)
        signal.alarm(_JUDGING_S)
        verdict = judge(case, scene, before, ended, command)
        (root / "verdict.json").write_text(verdict.to_json())
    except BaseException:
        (root / "keeper.txt").write_text(traceback.format_exc())
    os._exit(0)


def _wait(pid: int, scene: Scene, seconds: float, companions: Sequence[int]) -> Ended:
    """Wait for the command, kill it after its time, and kill what it left."""
    started = time.monotonic()
    descriptor = os.pidfd_open(pid)
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    in_time = bool(poll.poll(seconds * 1000))
    taken = time.monotonic() - started
    if not in_time:
        os.kill(pid, signal.SIGKILL)
    _, status, usage = os.wait4(pid, 0)
    others = [child for child in psutil.Process().children(recursive=True) if child.pid not in companions]
    _, left = psutil.wait_procs(others, timeout=_PATIENCE_S if in_time else 0)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    code = os.waitstatus_to_exitcode(status) if in_time else None
    output = [(scene.root / name).read_bytes()[-(2**22) :] for name in ("stdout", "stderr")]
    connections = sorted(set((scene.root / "connections").read_text().splitlines()))
    return Ended(code, output[0], output[1], taken, usage.ru_maxrss / 1024, in_time and bool(left), connections)


def _run_command(case: Case, scene: Scene, command: list[str]) -> NoReturn:
    """Become the process of the command, with limits, and end as `raydet` would."""
    os.setsid()
    os.chdir(scene.here)
    os.environ |= {"HOME": str(scene.home), "TMPDIR": str(scene.temporary)}
    tempfile.tempdir = None
    for number, name in ((1, "stdout"), (2, "stderr")):
        target = os.open(scene.root / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(target, number)
        os.close(target)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    _note_connections(scene.root / "connections")
    _hurry()
    if case.weight == "ray":
        os.environ["RAY_TMPDIR"] = str(scene.ray)
    else:
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S + 5))
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + ADDRESS_SPACE,) * 2)
        _refuse_ray()
        # Not with Ray, whose object store is one file of nearly a third of the memory.
        resource.setrlimit(resource.RLIMIT_FSIZE, (_FILE_BYTES,) * 2)
    rights.limit(case.rights)
    code = 1
    try:
        from raydet.cli.main import main

        code = main(command)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    except BaseException:
        traceback.print_exc()
    # As at the end of an interpreter: threads that still run keep it alive.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    with contextlib.suppress(BaseException):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _note_connections(path: Path) -> None:
    """Write each address that Python code connects to."""
    file = path.open("w", buffering=1)

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "socket.connect" and isinstance(arguments[1], tuple) and arguments[0].type == socket.SOCK_STREAM:
            file.write(f"{arguments[1][0]} {arguments[1][1]}\n")

    sys.addaudithook(note)


def _hurry() -> None:
    """Shorten the limits for web servers."""
    web = sys.modules.get("raydet.preparation.sources.web")
    if web is not None:
        web.WebReader.__init__.__kwdefaults__.update(_WEB_LIMITS_S)


def _refuse_ray() -> None:
    """Make a case that is not counted among those on Ray fail if it would start Ray."""

    def refuse(*_: object, **__: object) -> NoReturn:
        raise AssertionError("this case starts Ray, which its weight does not say")

    if "ray" in sys.modules:
        sys.modules["ray"].init = refuse  # type: ignore[attr-defined]


def end_on_sigterm() -> None:
    """Let SIGTERM remove the temporary folder too."""

    def interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)

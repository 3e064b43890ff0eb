"""A call leaves the caller's process unchanged, whether it returns or raises."""

import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from raydet.cluster.caller import LOG_FILE, chatter_logged, process_restored

SNAPSHOT = """
import contextlib, json, logging, os, signal, sys

def snapshot():
    loggers = {"": logging.root, **logging.root.manager.loggerDict}
    return {
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "signals": {number: repr(signal.getsignal(number)) for number in (1, 2, 3, 10, 12, 15, 17)},
        "loggers": {
            name: [logger.level, logger.propagate, logger.disabled, *map(repr, logger.handlers + logger.filters)]
            for name, logger in loggers.items()
            if isinstance(logger, logging.Logger) and (name in ("", "raydet") or name.partition(".")[0] == "ray")
        },
        "streams": [repr(sys.stdout), repr(sys.stderr), sys.stdout is sys.__stdout__, sys.stderr is sys.__stderr__],
        "descriptors": [os.readlink(f"/proc/self/fd/{number}") for number in (0, 1, 2)],
    }

def changes(before, after):
    found = {}
    for kind, value in before.items():
        # New loggers without handlers and levels change nothing.
        other = after[kind]
        if kind == "loggers":
            other = {name: state for name, state in other.items() if name in value or state != [0, True, False]}
        if other != value:
            found[kind] = [value, other]
            if isinstance(value, dict):
                found[kind] = {name: [value.get(name), other.get(name)] for name in {**value, **other}
                               if value.get(name) != other.get(name)}
    return found
"""


def _spoil(log: Path) -> None:
    os.environ["SOME_SETTING"] = "inside"
    os.environ.pop("KEPT", None)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    logging.getLogger("ray").setLevel(logging.CRITICAL)
    logging.getLogger("ray.data").addHandler(logging.NullHandler())
    logging.getLogger("ray.some.part").propagate = False
    os.write(2, b"of another process\n")
    print("of our own", file=sys.stderr)
    logging.getLogger("ray").critical("of a logger")


@pytest.mark.parametrize("raises", [False, True])
def test_what_is_changed_inside_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raises: bool) -> None:
    monkeypatch.setenv("KEPT", "outside")
    names: dict[str, object] = {}
    exec(SNAPSHOT, names)
    snapshot, changes = names["snapshot"], names["changes"]
    assert callable(snapshot) and callable(changes)
    before = snapshot()
    try:
        with process_restored(), chatter_logged(str(tmp_path)):
            _spoil(tmp_path)
            assert {"environment", "signals", "loggers", "descriptors"} <= changes(before, snapshot()).keys()
            if raises:
                raise RuntimeError("in the middle")
    except RuntimeError:
        assert raises
    assert changes(before, snapshot()) == {}
    log = (tmp_path / LOG_FILE).read_text()
    assert "of another process" in log and "of a logger" in log


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_training_and_scoring_leave_the_caller_s_process_as_it_was(shapes: Path, tmp_path: Path) -> None:
    script = (
        SNAPSHOT
        + """
from ray.data import DataContext
from raydet import PredictConfig, TrainConfig, predict, train
from raydet.common.errors import UserError

train_data, val_data, out = sys.argv[1:]
model = {"recipe": "none", "model": "rt_detr_v2_tiny", "image_size": 64, "batch_size": 8, "epochs": 1, "log_images": 0}
trained = {"train_data": train_data, "val_data": val_data, **model}
signal.signal(signal.SIGINT, lambda *_: None)  # the caller's own handler, as in a notebook
logging.getLogger("ray.train").addHandler(logging.StreamHandler())
DataContext.get_current().target_max_block_size = 12345
context = {name: repr(value) for name, value in vars(DataContext.get_current()).items()}
report = {}

def call(name, function, config, error=None):
    before = snapshot()
    try:
        function(config)
        said = None
    except UserError as raised:
        said = str(raised)
    assert bool(said) == bool(error), said
    found = changes(before, snapshot())
    after = {name: repr(value) for name, value in vars(DataContext.get_current()).items()}
    found |= {"context": [name for name in after if after[name] != context.get(name)]} if after != context else {}
    report[name] = found

call("failed training", train, TrainConfig(out=f"{out}/a", use_gpu=True, **trained), error=True)
call("training", train, TrainConfig(out=f"{out}/a", **trained))
data = {"checkpoint": f"{out}/a/checkpoint", "data": val_data}
call("failed scoring", predict, PredictConfig(out=f"{out}/b", use_gpu=True, **data), error=True)
call("scoring", predict, PredictConfig(out=f"{out}/c", batch_size=5, **data))
print(json.dumps(report))
"""
    )
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(shapes / "train"), str(shapes / "val"), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=380,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report == {"failed training": {}, "training": {}, "failed scoring": {}, "scoring": {}}

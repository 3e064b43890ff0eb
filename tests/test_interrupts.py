"""Ctrl-C on a terminal in each phase of the long commands: exit code 130, one line, no leftovers, resuming."""

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from raydet import PrepareImagesConfig, PrepareShapesConfig, prepare_images, prepare_shapes
from raydet.models.checkpoints import STATES_FOLDER
from raydet.training.history import read_history
from tests.outcomes import assert_same_rows, outcome_of_training
from tests.small_sets import rows_of, save_image, tiny_training
from tests.terminals import Terminal

pytestmark = [pytest.mark.slow, pytest.mark.timeout(500)]

SECONDS_TO_END = 30
"""For a machine with few, busy cores; Ray's own shutdown takes most of it."""
NUM_VALIDATED = 300


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tables `train` (24 rows) and `val`, which is large enough to keep a tiny model busy."""
    folder = tmp_path_factory.mktemp("many")
    prepare_shapes(PrepareShapesConfig(out=str(folder), num_train=24, num_val=NUM_VALIDATED, image_size=64))
    return folder


@pytest.fixture
def run() -> Iterator[Callable[..., Terminal]]:
    """A function that starts commands on terminals; the fixture closes them."""
    terminals: list[Terminal] = []

    def start(*words: str) -> Terminal:
        terminals.append(Terminal(words))
        return terminals[-1]

    yield start
    for terminal in terminals:
        terminal.close()


def _options(**options: Any) -> list[str]:
    return [f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in options.items()]


def _train(data: Path, out: Path, **changes: Any) -> list[str]:
    options = tiny_training(data, **{"epochs": 500, "validate_batch_size": 1, **changes})
    return ["train", *_options(out=str(out), **options)]


def _interrupt(terminal: Terminal, *, presses: int = 1) -> str:
    """Press Ctrl-C, check that the command stops cleanly, and return its last line."""
    started = len(terminal.text)
    for _ in range(presses):
        terminal.press_ctrl_c()
        time.sleep(0.2)
    assert terminal.exit_code(timeout_s=SECONDS_TO_END) == 130, terminal.text
    assert terminal.left_over() == []
    after = re.sub(r"\x1b\[[0-9;?]*\w", "", terminal.text[started:])
    assert "Traceback" not in after
    (line,) = [line for line in after.splitlines() if "raydet: " in line]
    return line


def _states(out: Path) -> list[str]:
    return sorted(path.name for path in out.glob(f"{STATES_FOLDER}/*.pt"))


def _log(out: Path) -> str:
    return "".join(path.read_text() for path in out.glob("log/node-*.log"))


# train


def test_train_before_the_first_step(many: Path, tmp_path: Path, run: Callable[..., Terminal]) -> None:
    out = tmp_path / "run"
    terminal = run(*_train(many, out))
    terminal.wait_until(lambda: "starting workers" in terminal.text)
    assert "run the same command again" in _interrupt(terminal)
    assert _states(out) == []


def test_train_in_the_midst_of_steps_and_again_while_saving(
    shapes: Path, tmp_path: Path, run: Callable[..., Terminal]
) -> None:
    out = tmp_path / "run"
    command = _train(shapes, out, save_every_steps=2, keep_states=3)
    terminal = run(*command)
    terminal.wait_until(lambda: "00000-0000002.pt" in _states(out))
    line = _interrupt(terminal)
    # The saved state is that of the step in the line.
    found = re.search(r"stopped after step (\d+) of epoch (\d+)", line)
    assert found is not None, line
    epoch, step = int(found[2]) - 1, int(found[1])
    assert _states(out)[-1] == f"{epoch:05d}-{step:07d}.pt"
    again = run(*command)
    num_epochs = len(read_history(str(out)))
    again.wait_until(lambda: len(read_history(str(out))) > num_epochs)  # the last file that an epoch writes
    assert "run the same command again" in _interrupt(again)
    assert f"after step {step} of epoch {epoch + 1}" in _log(out)


def test_train_in_validation(many: Path, tmp_path: Path, run: Callable[..., Terminal]) -> None:
    out = tmp_path / "run"
    terminal = run(*_train(many, out, epochs=1))
    terminal.wait_until(lambda: "epoch 1: 24 images" in _log(out))
    assert "stopped after step 6 of epoch 1" in _interrupt(terminal)
    assert _states(out) == ["00000-0000006.pt"] and read_history(str(out)) == []
    again = run(*_train(many, out, epochs=1))
    assert again.exit_code(timeout_s=200) == 0, again.text
    (record,) = read_history(str(out))
    assert record.value("AP") is not None and record.images_per_s > 0
    undisturbed = run(*_train(many, tmp_path / "undisturbed", epochs=1))
    assert undisturbed.exit_code(timeout_s=200) == 0, undisturbed.text
    assert_same_rows(outcome_of_training(out), outcome_of_training(tmp_path / "undisturbed"))


def test_train_twice_at_once(many: Path, tmp_path: Path, run: Callable[..., Terminal]) -> None:
    out = tmp_path / "run"
    terminal = run(*_train(many, out))
    terminal.wait_until(lambda: "epoch 1: 24 images" in _log(out))
    _interrupt(terminal, presses=2)


# the other commands


def test_tune(shapes: Path, tmp_path: Path, run: Callable[..., Terminal]) -> None:
    out = tmp_path / "out"
    file = tmp_path / "tune.yaml"
    content = {
        "train_config": tiny_training(shapes, epochs=3, validate_batch_size=1),
        "space": {"learning_rate": {"choice": [1e-3, 1e-4]}},
        "num_trials": 1,
        "search": "random",
        "out": str(out),
    }
    file.write_text(json.dumps(content))
    terminal = run("tune", "--config", str(file))
    terminal.wait_until(lambda: bool(list(out.glob("trials/trial-0000/states/*.pt"))))
    assert "run the same command again" in _interrupt(terminal)
    again = run("tune", "--config", str(file))
    assert again.exit_code(timeout_s=200) == 0, again.text
    assert len(read_history(str(out / "trials" / "trial-0000"))) == 3


def test_predict(many: Path, shapes: Path, tmp_path: Path, run: Callable[..., Terminal]) -> None:
    assert run(*_train(shapes, tmp_path / "run", epochs=1)).exit_code(timeout_s=200) == 0
    out = tmp_path / "detections"
    checkpoint = str(tmp_path / "run" / "checkpoint")
    options = {"checkpoint": checkpoint, "data": str(many / "val"), "batch_size": 1, "threads_per_worker": 1}
    command = ["predict", *_options(out=str(out), **options)]
    for condition in (lambda: out.exists(), lambda: bool(list(out.glob("*.parquet")))):
        terminal = run(*command)
        terminal.wait_until(condition)
        assert "run the same command again" in _interrupt(terminal)
    assert run(*command).exit_code(timeout_s=200) == 0
    undisturbed = str(tmp_path / "undisturbed")
    assert run("predict", *_options(out=undisturbed, **options)).exit_code(timeout_s=200) == 0
    rows = rows_of(out, "detections")
    assert len(rows) == NUM_VALIDATED
    assert_same_rows(rows, rows_of(undisturbed, "detections"))


def test_prepare_on_ray(tmp_path: Path, run: Callable[..., Terminal]) -> None:
    images, out = tmp_path / "images", tmp_path / "data"
    save_image(images / "0.jpg")
    content = (images / "0.jpg").read_bytes()
    for number in range(1, 4000):
        (images / f"{number}.jpg").write_bytes(content)
    command = ["prepare", "images", *_options(images=str(images), out=str(out), use_ray=True)]
    terminal = run(*command)
    terminal.wait_until(out.exists)
    assert "run the same command again" in _interrupt(terminal)
    assert run(*command).exit_code(timeout_s=200) == 0
    undisturbed = PrepareImagesConfig(images=str(images), out=str(tmp_path / "undisturbed"))
    assert prepare_images(undisturbed).accepted == 4000
    assert_same_rows(rows_of(out), rows_of(undisturbed.out))


def test_prepare(tmp_path: Path, run: Callable[..., Terminal]) -> None:
    out = tmp_path / "data"
    command = ["prepare", "shapes", *_options(out=str(out), num_train=20_000, num_val=10, image_size=64)]
    terminal = run(*command)
    terminal.wait_until(out.exists)
    assert "run the same command again" in _interrupt(terminal)
    assert run(*command[:2], *_options(out=str(out), num_train=50, num_val=10, image_size=64)).exit_code() == 0
    prepare_shapes(PrepareShapesConfig(out=str(tmp_path / "undisturbed"), num_train=50, num_val=10, image_size=64))
    for split in ("train", "val"):
        assert_same_rows(rows_of(out / split), rows_of(tmp_path / "undisturbed" / split))

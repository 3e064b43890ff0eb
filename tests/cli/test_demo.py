"""The demo, and the examples in the help that use its results."""

import shlex
from pathlib import Path

import pytest

import raydet
from raydet.cli.commands import COMMANDS
from raydet.cli.main import main
from tests.json_output import check_result

FOLLOWING = ("inspect", "predict", "evaluate", "compare", "report", "export coco", "export voc", "export yolo")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_demo_runs_twice_in_one_process_and_the_examples_follow_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for out in ("runs/demo", "runs/again"):
        result = raydet.demo(raydet.DemoConfig(out=out, num_train=32, num_val=8, epochs=1))
        assert Path(result.page).exists()
        assert check_result(result, "demo")["evaluation"]["result"]["num_images"] == 8
    for name in FOLLOWING:
        assert "runs/demo" in COMMANDS[name].example
        assert main(shlex.split(f"{name} {COMMANDS[name].example}")) == 0

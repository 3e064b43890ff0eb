"""A training run with the recipe of its model: what it writes and says, and how it resumes."""

import dataclasses
from pathlib import Path

import pytest

from raydet import TrainConfig, UserError, train
from raydet.cli.main import main
from raydet.common.console import Console
from raydet.config.options import load_file
from tests.small_sets import tiny_training


class _Lines(Console):
    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def line(self, text: str = "") -> None:
        self.said.append(text)


@pytest.mark.usefixtures("ray_cluster")
def test_a_run_writes_and_keeps_what_its_recipe_decided(shapes: Path, tmp_path: Path) -> None:
    options = tiny_training(shapes, recipe="auto", epochs=1, max_failures=0)
    config = TrainConfig(out=str(tmp_path / "run"), **options)
    console = _Lines()
    result = train(config, console=console)
    said = "\n".join(console.said)
    assert "learning rate 0.001" in said and "has no pretrained weights" in said
    assert result.lines()[-1].startswith("AP is low, because rt_detr_v2_tiny was trained from scratch")
    text = Path(result.out, "config.yaml").read_text()
    assert "batch_size: 4  # given\n" in text and "learning_rate: 0.001  # from scratch" in text
    used = load_file(TrainConfig, f"{result.out}/config.yaml")
    assert used.epochs == 1 and used.warmup_steps == 0 and used.precision == "fp32"

    assert train(config).already_done
    assert train(used).already_done  # config.yaml is the same run
    # A tenth of two epochs would be another warm-up, but the run has begun with that of one.
    more = train(dataclasses.replace(config, epochs=2))
    assert len(more.history) == 2 and load_file(TrainConfig, f"{result.out}/config.yaml").warmup_steps == 0
    with pytest.raises(UserError, match="--batch-size: 4 → 6"):
        train(dataclasses.replace(config, batch_size=6))


def test_print_config_shows_what_the_recipe_decides(shapes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = [f"--train-data={shapes}/train", f"--val-data={shapes}/val"]
    with pytest.raises(SystemExit) as stop:
        main(["train", *data, "--out=run", "--print-config", "--batch-size=4"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "batch_size: 4  # given\n" in printed and "learning_rate: 0.001  # from scratch" in printed

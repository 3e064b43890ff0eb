"""The loop: options of its steps, a round without labels, promotion, and a loop that is killed in several steps."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from raydet import LoopConfig, UserError, loop
from raydet.cli.rounds import LOOP_FILE, LoopResult, Round, is_stuck
from raydet.config.options import load
from raydet.models.loading import build_detector
from raydet.tables.schema import Category, build_schema
from raydet.tables.table import TableWriter, open_table
from tests.drivers import started, wait_for_progress
from tests.json_output import check_result, parse_output
from tests.outcomes import RecordingConsole, assert_same_rows, outcome_of_training
from tests.small_sets import files_below, rows_of, tiny_training


@pytest.fixture(scope="module")
def model(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny detector with random weights."""
    folder = str(tmp_path_factory.mktemp("model"))
    build_detector("rt_detr_v2_tiny", open_table(f"{shapes}/val").categories, image_size=64, seed=0).save(folder)
    return folder


def _config(shapes: Path, model: str, out: Path, **changes: Any) -> LoopConfig:
    data = ("train_data", "val_data", "model")
    training = {name: value for name, value in tiny_training(shapes, epochs=2).items() if name not in data}
    values: dict[str, Any] = {
        "checkpoint": model,
        "unlabelled": f"{shapes}/train",
        "train_data": f"{shapes}/train",
        "val_data": f"{shapes}/val",
        "truth": f"{shapes}/val",
        "out": str(out),
        "labels": {"threshold": 1.0},
        "predict": {"threads_per_worker": 1},
        "train": training,
        "evaluate": {"bootstrap": 20},
    }
    return LoopConfig(**{**values, **changes})


def test_a_mistake_in_any_step_is_found_before_the_first_one(shapes: Path, model: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    recipe = tmp_path / "train.yaml"
    recipe.write_text("class_mapping: {a: b}")
    empty = str(tmp_path / "empty")
    with TableWriter(empty, open_table(f"{shapes}/train").schema, config_hash="x"):
        pass
    val = open_table(f"{shapes}/val")
    more = build_schema("images", [*val.categories, Category(99, "cow")])
    with TableWriter(str(tmp_path / "more"), more, config_hash="x") as writer:
        writer.write_rows(rows_of(val.uri))
    for changes, message in (
        ({"predict": {"batch_sise": 3}}, "^--predict: unknown key `batch_sise`.*did you mean batch_size"),
        ({"predict": {"tile": 3}}, "^--predict: --tile must be at least 64"),
        ({"predict": {"limit": 3}}, "^--predict: a loop sets limit"),
        ({"predict": {"classes": ["cat"]}}, "cat"),
        ({"predict": {"engine": "onnx", "precision": "bf16"}}, "onnx"),
        ({"labels": {}}, "^--labels: set one of --threshold"),
        ({"labels": {"threshold": 0.5, "out": "elsewhere"}}, "^--labels: a loop sets out"),
        ({"labels": {"thresholds": str(tmp_path / "absent.yaml")}}, "^--labels: no such file"),
        ({"labels": {"target_precision": 0.9, "truth": "absent"}}, "^--labels: .*absent"),
        ({"labels": {"threshold": 0.5, "image_storage": "reference"}}, "omit --image-storage"),
        ({"train": {"epochs": 0}}, "^--train: --epochs must be above 0"),
        ({"train": {"schedule": "cosine", "schedule_options": {"num_cycle": 3}}}, "num_cycle"),
        ({"train": {"config": str(recipe)}}, "^--train: a loop sets class_mapping"),
        ({"train": {"config": 3}}, "^--train: `config` must name a file"),
        ({"evaluate": {"protocol": "voc"}}, "^--evaluate: a loop sets protocol"),
        ({"evaluate": {"bootstrap": 0}}, "^--evaluate: bootstrap must be above 0"),
        ({"evaluate": {"slice_by": ["camera"]}}, "^--evaluate: slice_by names camera"),
        ({"checkpoint": str(tmp_path / "absent")}, "absent"),
        ({"unlabelled": "absent"}, "no such table: .*absent"),
        ({"unlabelled": empty}, "^--unlabelled .* has no images"),
        ({"truth": empty}, "^--truth .* has no images"),
        ({"truth": str(tmp_path / "more")}, "^--truth .* has classes that --checkpoint does not know: cow"),
        ({"train_data": f"{shapes}/absent"}, "no such table: .*absent"),
        ({"truth": f"{shapes}/train"}, "^--truth is also --unlabelled"),
        ({"label_weight": 0.0}, "--label-weight must be from 0.001 to 100"),
        ({"rounds": 0}, "--rounds must be above 0"),
        ({"max_loss": 1.0}, "--max-loss must be at least 0 and below 1"),
    ):
        with pytest.raises(UserError, match=message):
            loop(_config(shapes, model, out, **changes))
        assert not out.exists(), changes


def test_a_loop_file_has_a_mapping_for_each_step(shapes: Path, model: str, tmp_path: Path) -> None:
    config = _config(shapes, model, tmp_path / "out")
    file = tmp_path / "loop.yaml"
    file.write_text(yaml.safe_dump(dataclasses.asdict(config)))
    again = load(LoopConfig, ["--config", str(file), "--labels", "threshold=0.7", "ignore_threshold=0.3"])
    assert again == dataclasses.replace(config, labels={"threshold": 0.7, "ignore_threshold": 0.3})


def test_a_round_without_labels_ends_the_loop(shapes: Path, model: str, tmp_path: Path) -> None:
    config = _config(shapes, model, tmp_path / "out")
    console = RecordingConsole()
    result = loop(config, console=console)
    assert "--truth is also --val-data" in console.lines[0]
    assert check_result(result, "loop")["rounds"][0]["checkpoint"] is None
    assert result.checkpoint == model and is_stuck(result.rounds) and not result.already_done
    assert "round-001: 0 labels; nothing to train on" in result.lines()
    metrics = rows_of(f"{config.out}/metrics/metrics", "metrics")
    assert {row["run"] for row in metrics} == {"first"}
    before = files_below(tmp_path)
    # Every step is the same in a further round.
    again = loop(dataclasses.replace(config, rounds=9))
    assert again == dataclasses.replace(result, already_done=True) and files_below(tmp_path) == before
    assert again.lines()[0].startswith("nothing to do")
    with pytest.raises(UserError, match=r"another run .*labels\.threshold: 1\.0 → 0\.5.*train\.epochs: 2 → 3"):
        loop(dataclasses.replace(config, labels={"threshold": 0.5}, train={**(config.train or {}), "epochs": 3}))
    Path(config.out, LOOP_FILE).write_text('{"rounds": [{"numbr": 1}]}')
    with pytest.raises(UserError, match=r"loop\.json is damaged"):
        loop(config)


def test_a_round_is_one_line() -> None:
    found: dict[str, Any] = {"number": 1, "num_labels": 1200, "checkpoint": "c", "ap_before": 0.4, "ap_after": 0.45}
    better = Round(**found, difference=0.05, low=0.01, high=0.09, is_promoted=True)
    assert better.line() == (
        "round-001: 1,200 labels; AP 0.400 → 0.450, +0.050 (95 % interval +0.010 … +0.090); promoted"
    )
    unknown = Round(**found, difference=0.05)
    assert unknown.line().endswith("+0.050 (too few images for an interval); not promoted")
    lines = LoopResult(out="out", checkpoint="c", rounds=(better, unknown)).lines()
    assert "would repeat the last one exactly" in lines[-2] and lines[-1] == "checkpoint: c"
    lines = LoopResult(out="out", checkpoint="c", rounds=(better,), already_done=True).lines()
    assert "raise --rounds" in lines[-2]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_loop_killed_in_several_steps_gives_the_same_result(shapes: Path, model: str, tmp_path: Path) -> None:
    # The AP of such a short training is 0, so every round is promoted.
    common = {"rounds": 2, "max_loss": 0.5, "labels": {"threshold": 0.01}}
    config, alone = (_config(shapes, model, tmp_path / name, **common) for name in ("out", "alone"))
    file, output, out = tmp_path / "loop.yaml", tmp_path / "output", Path(config.out)
    file.write_text(yaml.safe_dump(dataclasses.asdict(config)))
    command = [sys.executable, "-m", "raydet", "loop", "--config", str(file), "--json"]
    for place, is_killed in (
        ("first/held_out/.run.json", True),
        ("round-001/train/states/*.pt", True),
        ("round-001/held_out/.run.json", False),
        ("round-002/labels/.run.json", True),
        ("round-002/comparison", True),
    ):
        with started(command, output) as driver:
            wait_for_progress(lambda place=place: bool([*out.glob(place)]), driver, output)  # type: ignore[misc]
            if not is_killed:
                driver.terminate()
                assert driver.wait(timeout=60) == 143, output.read_text()
    with started(command, output) as driver:
        assert driver.wait(timeout=400) == 0, output.read_text()
    lines = [line for line in output.read_text().splitlines() if line.startswith("{")]
    result = parse_output("\n".join(lines), "loop")[-1]
    undisturbed = loop(alone)
    assert [item["is_promoted"] for item in result["rounds"]] == [True, True]
    assert result["checkpoint"] == f"{out}/round-002/train/checkpoint"
    written = json.loads((out / LOOP_FILE).read_text())
    assert written == {"checkpoint": result["checkpoint"], "rounds": result["rounds"]}
    expected = [dataclasses.asdict(item) for item in undisturbed.rounds]
    for row in (*result["rounds"], *expected):
        row["checkpoint"] = row["checkpoint"].removeprefix(str(tmp_path)).split("/", 2)[2]
    assert_same_rows(result["rounds"], expected)
    for name in ("round-001", "round-002"):
        assert_same_rows(outcome_of_training(out / name / "train"), outcome_of_training(Path(alone.out, name, "train")))
        for table, kind in (("held_out", "detections"), ("labels", "images")):
            assert_same_rows(rows_of(out / name / table, kind), rows_of(f"{alone.out}/{name}/{table}", kind))
    # The second round trains the model of the first on its own labels.
    settings = yaml.safe_load((out / "round-002" / "train" / "config.yaml").read_text())
    assert settings["model"] == f"{out}/round-001/train/checkpoint"
    assert settings["train_data"] == [f"{shapes}/train", f"{out}/round-002/labels"]
    more = loop(dataclasses.replace(alone, rounds=3, train={**(alone.train or {}), "max_failures": 0}))
    assert len(more.rounds) == 3 and more.rounds[:2] == undisturbed.rounds and not more.already_done

"""Class lists that differ in order or length: of the two tables, of a resumed run, of a checkpoint."""

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from raydet import EvaluateConfig, PredictConfig, TrainConfig, UserError, evaluate, predict, train
from raydet.models.loading import build_detector, load_detector
from raydet.tables.schema import Category, build_schema
from raydet.tables.table import TableWriter, open_table
from tests.outcomes import RecordingConsole, weights_hash
from tests.small_sets import tiny_training

pytestmark = pytest.mark.usefixtures("ray_cluster")


def write_with_classes(source: Path, target: Path, names: Sequence[str]) -> None:
    """Write an images table with its classes in another order, or written in another way."""
    table = open_table(str(source), "images")
    own = [category.name for category in table.categories]
    place_of = [[name.lower() for name in names].index(name) for name in own]
    rows = table.read().to_pylist()
    for row in rows:
        row["objects"]["category"] = [place_of[index] for index in row["objects"]["category"]]
    shutil.rmtree(target, ignore_errors=True)
    categories = [Category(index, name) for index, name in enumerate(names)]
    with TableWriter(str(target), build_schema("images", categories), config_hash="x") as writer:
        writer.write_rows(rows)


def test_the_order_of_the_classes_changes_nothing(shapes: Path, tmp_path: Path) -> None:
    """Check a validation table and a resumed run, whose tables order the classes differently."""
    own = ["rectangle", "ellipse", "triangle"]
    for name in ("train", "val"):
        write_with_classes(shapes / name, tmp_path / name, own)
    options = {**tiny_training(tmp_path, epochs=2, learning_rate=1e-3, batch_size=6), "schedule_epochs": 2}
    plain = train(TrainConfig(out=str(tmp_path / "plain"), **options))
    other = TrainConfig(out=str(tmp_path / "other"), **{**options, "epochs": 1})
    write_with_classes(shapes / "val", tmp_path / "val", ["Triangle", "rectangle", "ELLIPSE"])
    train(other)
    write_with_classes(shapes / "train", tmp_path / "train", own[::-1])
    resumed = train(dataclasses.replace(other, epochs=2))
    assert weights_hash(f"{plain.out}/last") == weights_hash(f"{resumed.out}/last")
    for one, another in zip(plain.history, resumed.history, strict=True):
        assert one.losses == another.losses
        assert one.validation is not None and another.validation is not None
        assert one.validation.ap_by_class == another.validation.ap_by_class
        assert one.validation.numbers == another.validation.numbers
    write_with_classes(shapes / "val", tmp_path / "train", own)
    console = RecordingConsole()
    train(dataclasses.replace(other, epochs=3), console=console)
    assert [line for line in console.lines if "written again" in line] == [
        "--train-data has been written again since the run began, which goes on with the new images"
    ]
    write_with_classes(shapes / "train", tmp_path / "train", [*own, "star"])
    with pytest.raises(UserError, match=r"classes of --train-data have changed.*star"):
        train(dataclasses.replace(other, epochs=4))


def test_a_validation_table_may_lack_classes_but_not_have_others(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_with_classes(shapes / "train", tmp_path / "train", ["rectangle", "star", "ellipse", "triangle"])
    shutil.copytree(shapes / "val", tmp_path / "val")
    config = TrainConfig(out=str(tmp_path / "run"), **tiny_training(tmp_path, epochs=1))
    record = train(config).history[-1].validation
    assert "which AP leaves out: star" in capsys.readouterr().out
    assert record is not None and record.ap_by_class["star"] is None and len(record.ap_by_class) == 4
    swapped = dataclasses.replace(
        config, out=str(tmp_path / "x"), train_data=config.val_data, val_data=str(config.train_data)
    )
    with pytest.raises(UserError, match=r"--val-data has classes that --train-data .* lacks: star"):
        train(swapped)


def test_a_checkpoint_for_ninety_one_ids_is_scored_and_tuned(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = ["N/A"] * 91
    labels[1], labels[5], labels[40], labels[90] = "Triangle", "rectangle", "ELLIPSE", "toothbrush"
    model = str(tmp_path / "model")
    categories = [Category(index, name) for index, name in enumerate(labels)]
    build_detector("conditional_detr_tiny", categories, image_size=64, seed=0).save(model)
    found = str(tmp_path / "found")
    predict(PredictConfig(data=f"{shapes}/val", checkpoint=model, out=found, score_threshold=0.0))
    num_found = sum(len(row["detections"]["score"]) for row in open_table(found, "detections").read().to_pylist())
    evaluation = evaluate(EvaluateConfig(truth=f"{shapes}/val", detections=found))
    assert evaluation.num_other_class > 0
    assert evaluation.num_other_class + evaluation.result.num_detections == num_found
    assert [category.name for category in evaluation.result.categories] == ["rectangle", "ellipse", "triangle"]
    options = {**tiny_training(shapes, epochs=1), "model": model}
    result = train(TrainConfig(out=str(tmp_path / "run"), **options))
    assert "classes that keep the checkpoint's weights: rectangle, ellipse, triangle" in capsys.readouterr().out
    assert [category.name for category in load_detector(result.checkpoint).categories] == [
        "rectangle",
        "ellipse",
        "triangle",
    ]

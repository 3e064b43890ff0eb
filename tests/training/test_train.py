"""Training on generated images: the run folder, the checkpoint, resuming, one worker and two."""

import contextlib
import dataclasses
import io
import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForObjectDetection, pipeline

from raydet import TrainConfig, UserError, train
from raydet.common.boxes import Boxes, xywh_to_xyxy
from raydet.common.console import Console
from raydet.common.errors import RunStopped
from raydet.engines.torch_engine import TorchEngine
from raydet.models.checkpoints import STATES_FOLDER
from raydet.models.detector import Detections
from raydet.models.loading import build_detector, load_detector
from raydet.tables.table import open_table
from raydet.training.history import read_history
from raydet.training.train import TrainResult
from tests.json_output import parse_output
from tests.outcomes import RecordingConsole, weights_hash
from tests.small_sets import tiny_training


def _config(shapes: Path, out: Path, **changes: Any) -> TrainConfig:
    options: dict[str, Any] = {
        "epochs": 6,
        "batch_size": 6,
        "validate_batch_size": 4,
        "learning_rate": 1e-3,
        "ema_decay": 0.9,
        "save_every_steps": 3,
        "log_images": 2,
    }
    return TrainConfig(out=str(out), **tiny_training(shapes, **{**options, **changes}))


Trained = tuple[TrainConfig, TrainResult, str]
"""Config and result of a run, and the hash of its best weights."""
_OUTPUT = "output.jsonl"
"""File beside the run with what `train --json` printed."""


@pytest.fixture(scope="module")
def trained(shapes: Path, tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Trained:
    """A finished run of six epochs with a callback of the user."""
    config = _config(shapes, tmp_path_factory.mktemp("run") / "a", trackers=["tests.callbacks:Journal"])
    with Path(config.out).with_name(_OUTPUT).open("w") as output, contextlib.redirect_stdout(output):
        console = Console("json", command="train")
        result = train(config, console=console)
        console.result(result)
    return config, result, weights_hash(result.checkpoint)


def test_a_result_can_be_looked_at_and_its_model_be_used(trained: Trained) -> None:
    _, result, _ = trained
    table = result.history.to_pandas()
    assert table["loss"].tolist() == [record.loss for record in result.history]
    assert {curve.name for curve in result.plot().data} == {"loss", "validation loss", "AP", "AP50", "AP75"}
    found = result.load(score_threshold=0.0, threads_per_worker=1)(np.zeros((48, 64, 3), np.uint8))
    assert len(found) > 0 and f"checkpoint: {result.checkpoint}" in result._repr_html_()


def test_a_run_leaves_a_model_folder_and_its_history(trained: Trained) -> None:
    config, result, _ = trained
    assert result.out == config.out and result.checkpoint == f"{config.out}/checkpoint"
    model = AutoModelForObjectDetection.from_pretrained(result.checkpoint)
    AutoImageProcessor.from_pretrained(result.checkpoint)
    assert list(model.config.id2label.values()) == [c.name for c in open_table(config.val_data, "images").categories]
    assert [record.epoch for record in result.history] == [1, 2, 3, 4, 5, 6]
    for record in result.history:
        assert record.loss == pytest.approx(sum(record.losses.values()))
        assert {"loss_vfl", "loss_bbox", "loss_giou"} <= set(record.losses)
        assert record.num_unreadable == 0 and record.images_per_s > 0
        assert record.validation is not None and len(record.validation.ap_by_class) == 3
        assert 0 <= (record.value("AP") or 0.0) <= 1
        assert set(record.step_s) == {"data", "compute", "communication"} and record.step_s["communication"] < 0.1
        assert (record.peak_memory_mb or 0) > 100
    assert result.history[-1].loss < result.history[0].loss
    assert read_history(config.out) == result.history
    assert Path(config.out, "config.yaml").is_file() and Path(config.out, "log", "ray.log").exists() is False
    assert Path(config.out, "last", "model.safetensors").is_file()
    # Four steps per epoch: a state after the third step of the last epoch, and one at its end.
    assert sorted(path.name for path in Path(config.out, STATES_FOLDER).iterdir()) == [
        "00005-0000003.pt",
        "00006-0000000.pt",
    ]
    assert list(Path(config.out, "log", "tensorboard").glob("events.*"))


def test_its_progress_as_json(trained: Trained) -> None:
    config, result, _ = trained
    objects = parse_output(Path(config.out).with_name(_OUTPUT).read_text(), "train")
    epochs = [item for item in objects if item["type"] == "epoch"]
    assert [item["loss"] for item in epochs] == [record.loss for record in result.history]
    tasks = {item["task"]: item for item in objects if item["type"] == "progress"}  # the last object of each
    assert tasks["training"]["waiting_for"] == "starting workers"
    last = tasks[[*tasks][-1]]
    assert last["task"].startswith("epoch 6/6") and last["unit"] == "images"
    assert last["total"] in (10, 24) and last["values"]["memory_mb"] > 0 and last["values"]["loss"] > 0
    assert objects[-1]["best"]["epoch"] == result.best.epoch and len(objects[-1]["history"]) == 6


def test_a_callback_by_import_path_sees_each_epoch(trained: Trained) -> None:
    config, result, _ = trained
    lines = Path(config.out, "log", "journal.jsonl").read_text().splitlines()
    values = {step: logs["eval_AP"] for step, logs in map(json.loads, lines) if "eval_AP" in logs}
    assert values == {4 * record.epoch: record.value("AP") for record in result.history}


def test_the_checkpoint_gives_the_same_boxes_without_raydet(trained: Trained) -> None:
    config, result, _ = trained
    rows = open_table(config.val_data, "images").read().to_pylist()
    engine = TorchEngine(load_detector(result.checkpoint))
    model = AutoModelForObjectDetection.from_pretrained(result.checkpoint).eval()
    processor = AutoImageProcessor.from_pretrained(result.checkpoint)
    detect = pipeline("object-detection", model=model, image_processor=processor)
    for row in rows[:5]:
        image = Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")
        size_hw = (image.height, image.width)
        own = engine.predict(engine.prepare([np.asarray(image)]))[0]
        with torch.inference_mode():
            outputs = model(**processor(images=image, return_tensors="pt"))
        plain = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=[size_hw])[0]
        own_xyxy = xywh_to_xyxy(own.boxes_xywh)
        assert len(plain["scores"]) == len(own.scores) > 0
        np.testing.assert_allclose(plain["scores"].sort(descending=True).values, own.scores, atol=1e-3)
        for score, label, box in zip(plain["scores"], plain["labels"], plain["boxes"], strict=True):
            assert _is_there(own, own_xyxy, float(score), int(label), box.numpy(), tolerance_px=0.5)
        for found in detect(image, threshold=0.01):
            label = model.config.label2id[found["label"]]
            box = np.array([found["box"][side] for side in ("xmin", "ymin", "xmax", "ymax")])
            assert _is_there(own, own_xyxy, found["score"], label, box, tolerance_px=1.0)


def _is_there(
    own: Detections, own_xyxy: Boxes, score: float, label: int, box_xyxy: Boxes, *, tolerance_px: float
) -> bool:
    near = np.abs(own_xyxy - box_xyxy).max(axis=1) <= tolerance_px
    return bool((near & (np.abs(own.scores - score) <= 1e-3) & (own.categories == label)).any())


def test_a_finished_run_says_so_and_another_run_is_refused(trained: Trained) -> None:
    config, result, _ = trained
    before = {path: path.stat().st_mtime_ns for path in Path(config.out).rglob("*")}
    again = train(dataclasses.replace(config, num_workers=2))
    assert again.already_done and again.history == result.history
    assert "nothing to do" in again.lines()[0]
    with pytest.raises(UserError, match=r"--learning-rate.*0\.001.*0\.002"):
        train(dataclasses.replace(config, learning_rate=2e-3))
    assert {path: path.stat().st_mtime_ns for path in Path(config.out).rglob("*")} == before


@pytest.mark.usefixtures("ray_cluster")
def test_a_stop_request_in_the_last_step_stops_the_caller_too(shapes: Path, tmp_path: Path) -> None:
    config = _config(shapes, tmp_path / "run", epochs=1, validate_fraction=0.1, save_every_steps=None, log_images=0)
    with pytest.raises(RunStopped, match="training is finished") as stopped:
        train(config, on_epoch=lambda _: os.kill(os.getpid(), signal.SIGTERM))
    assert stopped.value.exit_code == 143
    assert train(config).already_done


@pytest.mark.slow
def test_two_workers_go_on_where_one_stopped(trained: Trained) -> None:
    config, result, _ = trained
    more = train(dataclasses.replace(config, epochs=7, num_workers=2))
    assert more.history[:6] == result.history
    assert more.history[6].epoch == 7 and more.history[6].value("AP") is not None
    assert more.history[6].loss < result.history[0].loss


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_all_at_once_and_more_workers_than_images_in_the_last_step(shapes: Path, tmp_path: Path) -> None:
    # 24 images in steps of 23: the last step has one image for two workers with two micro-batches each.
    config = _config(
        shapes,
        tmp_path / "run",
        model="detr_tiny",
        epochs=3,
        batch_size=23,
        gradient_accumulation_steps=2,
        num_workers=2,
        precision="bf16",
        augmentation="strong",
        close_mosaic=1,
        multi_scale=[64, 96],
        freeze_backbone="all",
        unfreeze_epoch=2,
        batch_norm="sync",
        gradient_checkpointing=True,
        validate_every=2,
        validate_fraction=0.5,
        metric_for_best_model="AP:ellipse",
        schedule="one_cycle",
    )
    result = train(config)
    assert [record.validation is not None for record in result.history] == [False, True, True]
    assert all(record.value("AP") is not None for record in result.history[1:])
    assert all(0 < record.loss < 100 for record in result.history)
    assert all(record.step_s["communication"] > 0 for record in result.history)
    start = build_detector("detr_tiny", load_detector(result.checkpoint).categories, image_size=64, seed=0)
    name = "model.backbone.model.embedder.embedder.convolution.weight"
    assert not torch.equal(start.model.state_dict()[name], load_detector(result.checkpoint).model.state_dict()[name])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_data": "absent"}, "absent"),
        ({"model": "no_such_model"}, "no_such_model"),
        ({"model": "."}, "config.json"),
        ({"image_size": 100}, "--image-size.*32.*100; the nearest: 96 or 128"),
        ({"model": "lw_detr_tiny", "image_size": 80}, "--image-size.*32.*lw_detr_tiny.*80; the nearest: 64 or 96"),
        ({"model": "lw_detr_tiny", "image_size": 96, "multi_scale": [80]}, "--multi-scale.*32.*lw_detr_tiny.*80"),
        ({"model": "rt_detr_v2_small", "image_size": 64}, "--image-size must be at least 96 .*got 64.*queries"),
        (
            {"model": "rt_detr_v2_small", "image_size": 96, "multi_scale": [64]},
            "--multi-scale must be at least 96 .*64",
        ),
        ({"model": "rf_detr_tiny", "image_size": 96, "multi_scale": [144]}, "--multi-scale.*32.*144; .*: 128 or 160"),
        ({"trackers": ["wandb", "trackio"]}, "--trackers requires trackio; run: pip install trackio"),
        ({"train_data": ["DATA/train", "absent:0.5"]}, "no such table: .*absent$"),
        ({"train_data": ["DATA/train", "DATA/train:2"]}, "--train-data names .*train twice; use a weight"),
        ({"train_data": "DATA/train:0"}, "--train-data .*train:0: the weight must be above 0"),
        ({"train_data": ["DATA/train", "DATA/val:1000"]}, "no such table: .*val:1000"),
        ({"rename_classes": {"cat": "dog"}}, "--rename-classes: no table has a class cat; they have"),
        ({"rename_classes": "absent.yaml"}, "--rename-classes: no such file: absent.yaml"),
        ({"rename_classes": {"ellipse": "disc"}, "metric_for_best_model": "AP:circle"}, "no such class.*disc"),
    ],
)
def test_mistakes_are_found_before_anything_is_written(
    shapes: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    def placed(value: Any) -> Any:
        text = json.dumps(value).replace("DATA", str(shapes))
        return json.loads(text)

    with pytest.raises(UserError, match=message):
        train(_config(shapes, tmp_path / "run", **placed(changes)))
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("ray_cluster")
def test_mixed_tables_are_announced_and_trained_on(shapes: Path, tmp_path: Path) -> None:
    """Check the counts by table and class of a run of two tables whose classes are renamed by a file."""
    (tmp_path / "names.yaml").write_text("ellipse: disc\n")
    data = [f"{shapes}/train", f"{shapes}/val:0.5"]
    names = str(tmp_path / "names.yaml")
    console = RecordingConsole()
    config = _config(shapes, tmp_path / "run", epochs=1, train_data=data, repeat_rare=0.9, rename_classes=names)
    result = train(config, console=console)
    shown = json.loads((tmp_path / "run" / "log" / "training_data.json").read_text())
    assert [table["images"] for table in shown["tables"]] == [24, 10]
    assert [table["weight"] for table in shown["tables"]] == [1.0, 0.5]
    assert "disc" in shown["tables"][0]["boxes_per_epoch"] and "ellipse" not in shown["tables"][0]["boxes_per_epoch"]
    total = sum(table["images_per_epoch"] for table in shown["tables"])
    assert shown["images_per_epoch"] == round(total) > 24 + 5
    assert any(line.startswith(f"{round(total)} images per epoch, of 34 images") for line in console.lines)
    assert "disc" in [category.name for category in load_detector(result.checkpoint).categories]
    recorded = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert recorded["train_data"] == data and recorded["rename_classes"] == {"ellipse": "disc"}


def test_a_folder_with_other_files_is_refused(shapes: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match=r"thesis\.txt"):
        train(_config(shapes, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_mistake_that_only_the_workers_see_is_one_line_too(shapes: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    build_detector("conditional_detr_tiny", open_table(str(shapes / "train")).categories, image_size=64, seed=0).save(
        str(model)
    )
    (model / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match="cannot read the model in") as error:
        train(_config(shapes, tmp_path / "run", model=str(model)))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(
    ("changes", "message"),
    [({"use_gpu": True}, "GPU"), ({"cpus_per_worker": 2.0}, "CPU")],
)
def test_more_than_the_machine_has_is_refused_instead_of_waited_for(
    shapes: Path, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        train(_config(shapes, tmp_path / "run", **changes))
    assert not (tmp_path / "run" / "config.yaml").exists()

"""An epoch's validation against `predict` and `evaluate` of its checkpoint: one inference path, so one answer."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from PIL import Image

from raydet import (
    EvaluateConfig,
    PredictConfig,
    PrepareShapesConfig,
    evaluate,
    predict,
    prepare_shapes,
    train,
)
from raydet.augmentation.view import View
from raydet.common.boxes import as_boxes, xywh_to_normalised_cxcywh
from raydet.config import Precision, ResolvedTrainConfig
from raydet.models.collate import Example, collate
from raydet.models.detector import Detections
from raydet.models.geometry import resize
from raydet.models.loading import load_detector
from raydet.models.losses.final_boxes import FinalLoss, mean_loss
from raydet.tables.table import open_table
from raydet.training.feeding.ordering import RunPlan
from raydet.training.feeding.stream import read_stream, run_stream
from raydet.training.feeding.views import Views
from raydet.training.state import newest_state, parse_state
from raydet.training.trainer import Trainer
from raydet.training.validation import detect
from tests.small_sets import tiny_training

pytestmark = pytest.mark.usefixtures("ray_cluster", "one_thread")

BATCH_SIZE = 4


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tables `train` and `val` with as many pictures as a small model needs to find something after an epoch."""
    folder = tmp_path_factory.mktemp("pictures")
    prepare_shapes(PrepareShapesConfig(out=str(folder), num_train=1600, num_val=20, image_size=64, max_shapes=2))
    return folder


def _config(pictures: Path, out: Path, **changes: Any) -> ResolvedTrainConfig:
    options: dict[str, Any] = {
        "epochs": 1,
        "batch_size": 8,
        "validate_batch_size": BATCH_SIZE,
        "learning_rate": 1e-3,
        "backbone_learning_rate": 1e-3,
        "warmup_steps": 20,
        "ema_decay": 0.9,
    }
    return ResolvedTrainConfig(out=str(out), **tiny_training(pictures, **{**options, **changes}))


def _validated(config: ResolvedTrainConfig) -> dict[int, Detections]:
    """The detections of the validation after the last epoch, by image id."""
    train_table, val_table = (open_table(str(uri), "images") for uri in (config.train_data, config.val_data))
    data = newest_state(config.out)
    assert data is not None
    cpu = torch.device("cpu")
    plan = RunPlan.of_training(config, train_table, num_val=val_table.num_rows)
    trainer = Trainer(
        config, val_table.categories, steps_per_epoch=plan.steps_per_epoch, device=cpu, rank=0, world_size=1
    )
    trainer.load_state_dict(parse_state(data, cpu).of_rank(0, 1))
    (iterator,) = run_stream(
        plan,
        train=train_table,
        val=val_table,
        views=Views(View.of_training(config, trainer.detector.resize_rule, ())),
        world_size=1,
        ranks=[0],
        start_epoch=config.epochs - 1,
        start_step=plan.steps_per_epoch,
        decoders=[ray.get_runtime_context().get_node_id()],
    )
    found: dict[int, Detections] = {}
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the workers of both commands have
    try:
        with trainer.averaged():
            engine = trainer.engine()
            for batch in read_stream(iterator):
                assert batch.micro_batch.kind == "validate"
                found |= detect(engine, batch)
    finally:
        torch.set_num_threads(num_threads)
    assert len(found) == val_table.num_rows
    return found


def _predicted(config: ResolvedTrainConfig, out: Path, **options: Any) -> tuple[dict[int, Detections], float | None]:
    """The detections of the run's last checkpoint, by image id, and their AP."""
    values = {"checkpoint": f"{config.out}/last", "data": config.val_data, "threads_per_worker": 1, **options}
    result = predict(PredictConfig(out=str(out), **values))
    found = {}
    for row in open_table(result.out, "detections").read().to_pylist():
        boxes, scores, categories = (row["detections"][name] for name in ("bbox", "score", "category"))
        found[row["image_id"]] = Detections(np.array(boxes).reshape(-1, 4), np.array(scores), np.array(categories))
    evaluation = evaluate(EvaluateConfig(truth=config.val_data, detections=result.out))
    return found, evaluation.result.AP


def _assert_close(found: dict[int, Detections], expected: dict[int, Detections], *, score: float, px: float) -> None:
    """One to one; where two scores are closer than the tolerance, either may come first."""
    assert found.keys() == expected.keys()
    for image_id, mine in found.items():
        theirs = expected[image_id]
        assert len(mine.scores) == len(theirs.scores) > 0
        np.testing.assert_allclose(mine.scores, theirs.scores, atol=score, rtol=0)
        is_same = np.abs(mine.boxes_xywh[:, None] - theirs.boxes_xywh).max(axis=2) <= px
        is_same &= np.abs(mine.scores[:, None] - theirs.scores) <= score
        is_same &= mine.categories[:, None] == theirs.categories
        assert is_same.any(axis=1).all() and is_same.any(axis=0).all()


@pytest.mark.parametrize(
    ("model", "precision"),
    [
        ("rt_detr_v2_tiny", "fp32"),
        pytest.param("rt_detr_v2_tiny", "bf16", marks=pytest.mark.slow),
        pytest.param("conditional_detr_tiny", "fp32", marks=pytest.mark.slow),
    ],
)
def test_predict_and_evaluate_give_the_detections_and_ap_of_the_epoch(
    pictures: Path, tmp_path: Path, model: str, precision: Precision
) -> None:
    config = _config(pictures, tmp_path / "run", model=model, precision=precision)
    record = train(config).history[-1]
    assert (record.value("AP") or 0.0) > 0, "too little was learnt to tell"
    validated = _validated(config)
    # The same batches, threads and memory layout: the same bits.
    same, ap = _predicted(
        config, tmp_path / "same", precision=precision, batch_size=BATCH_SIZE, channels_last=False, pad_batches=True
    )
    for image_id, found in validated.items():
        for name, values in vars(found).items():
            np.testing.assert_array_equal(values, getattr(same[image_id], name), err_msg=name)
    assert ap == record.value("AP")
    # Other batches in another layout; in bf16 rounding may choose other queries, so that only AP can be compared.
    other, ap = _predicted(config, tmp_path / "other", precision=precision, batch_size=7)
    if precision == "fp32":
        _assert_close(validated, other, score=1e-5, px=0.01)
    assert ap == pytest.approx(record.value("AP"), abs=1e-4 if precision == "fp32" else 1e-2)


@pytest.mark.slow
def test_the_loss_that_selects_is_that_of_the_validation_on_any_number_of_workers(shapes: Path, tmp_path: Path) -> None:
    """Check runs that hardly move the weights: all epochs have the loss of the untouched model, to the last bit."""
    losses = []
    for num_workers in (1, 2):
        config = _config(
            shapes,
            tmp_path / str(num_workers),
            batch_norm="freeze",
            ema_decay=0.0,
            epochs=2,
            learning_rate=1e-30,
            backbone_learning_rate=1e-30,
            metric_for_best_model="loss",
            num_workers=num_workers,
        )
        losses += [record.value("loss") for record in train(config).history]
    assert len(set(losses)) == 1
    detector = load_detector(f"{tmp_path}/1/checkpoint")
    loss, rule = FinalLoss(), detector.resize_rule
    for row in open_table(f"{shapes}/val", "images").read().to_pylist():  # one image after another
        image = np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB"))
        size_hw = (image.shape[0], image.shape[1])
        boxes = xywh_to_normalised_cxcywh(as_boxes(row["objects"]["bbox"]), size_hw).astype(np.float32)
        resized = resize(image, rule.target_size_hw(size_hw), rule.resample)
        batch = collate([Example(row["image_id"], resized, size_hw, boxes, np.array(row["objects"]["category"]))])
        with torch.inference_mode():
            outputs: Any = detector.model(**detector.model_inputs(batch))
            loss.add(detector, outputs.logits, outputs.pred_boxes, batch.labels)
    assert losses[0] == pytest.approx(mean_loss(detector, [loss]), rel=1e-5)

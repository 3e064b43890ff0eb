"""The resize on the model's device, which is the CPU here, against the resize in the decoders."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raydet import EvaluateConfig, PredictConfig, UserError, evaluate, predict
from raydet.config import ResizeOn
from raydet.models.loading import build_detector
from raydet.preparation.sources.shapes import CATEGORIES
from raydet.scoring.predict import predict_with
from tests.models.test_padding_accuracy import stretched_picture
from tests.small_sets import rows_of, write_drawn

pytestmark = pytest.mark.integration

NUM_IMAGES = 40
NUM_BEST = 3


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> PredictConfig:
    """A tiny model that keeps the aspect ratio and pads to the largest image, and images of many shapes."""
    folder = tmp_path_factory.mktemp("resize_on")
    build_detector("conditional_detr_tiny", CATEGORIES, image_size=64, seed=3).save(str(folder / "model"))
    processor = folder / "model" / "preprocessor_config.json"
    changes = {"size": {"shortest_edge": 64, "longest_edge": 107}, "pad_size": None}
    processor.write_text(json.dumps(json.loads(processor.read_text()) | changes))
    pictures = (stretched_picture("val", number) for number in range(NUM_IMAGES))
    data = write_drawn(folder / "images", pictures)
    return PredictConfig(checkpoint=str(folder / "model"), data=data, out=str(folder / "d"), threads_per_worker=1)


def scored(
    config: PredictConfig, folder: Path, resize_on: ResizeOn, **options: Any
) -> tuple[str, list[dict[str, Any]]]:
    out = str(folder / resize_on)
    predict_with(dataclasses.replace(config, out=out, resize_on=resize_on, **options), in_process=True)
    return out, rows_of(out, "detections")


@pytest.mark.parametrize(
    "options",
    [{"flip": True}, {"tile": 96}, {"reduced_decode": True}, {"pad_batches": False, "batch_size": 3}],
    ids=lambda options: next(iter(options)),
)
def test_the_boxes_are_those_of_the_resize_in_decoders(
    config: PredictConfig, tmp_path: Path, options: dict[str, Any]
) -> None:
    here, there = (scored(config, tmp_path, place, **options)[1] for place in ("cpu", "device"))
    assert len(there) == NUM_IMAGES
    assert here != there  # otherwise the option would have no effect
    for mine, theirs in zip(there, here, strict=True):
        found, expected = mine.pop("detections"), theirs.pop("detections")
        assert mine == theirs
        np.testing.assert_allclose(found["score"][:20], expected["score"][:20], atol=2e-3)
        between_px = np.abs(np.array(found["bbox"])[:, None] - np.array(expected["bbox"])[:5]).max(axis=2)
        assert (between_px.min(axis=0) < 0.5).all()


def test_ap_stays_the_same(config: PredictConfig, tmp_path: Path) -> None:
    """The truth is the best boxes of the resize in decoders, so that each box that moves or changes place counts."""
    here, rows = scored(config, tmp_path, "cpu")
    there, _ = scored(config, tmp_path, "device")
    best = [[row["detections"][name][:NUM_BEST] for name in ("bbox", "category")] for row in rows]
    pictures = ((stretched_picture("val", number)[0], *best[number]) for number in range(NUM_IMAGES))
    truth = write_drawn(tmp_path / "truth", pictures)
    ap, ap_there = (evaluate(EvaluateConfig(truth=truth, detections=out)).result.AP or 0.0 for out in (here, there))
    assert 0.1 < ap < 1
    assert ap_there == pytest.approx(ap, abs=1e-3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"engine": "openvino"}, "--resize-on device needs --engine torch, got openvino"),
        ({"engine": "onnx"}, "--resize-on device needs --engine torch, got onnx"),
        ({"checkpoint": None, "model": "m", "labels": ["cat"]}, "--resize-on device needs --checkpoint"),
    ],
)
def test_what_cannot_resize_on_the_device_is_refused(
    config: PredictConfig, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        dataclasses.replace(config, resize_on="device", **options)


def test_lanczos_and_another_place_for_the_same_folder_are_refused(config: PredictConfig, tmp_path: Path) -> None:
    folder = tmp_path / "lanczos"
    build_detector("conditional_detr_tiny", CATEGORIES, image_size=64, seed=3).save(str(folder))
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"resample": 1}))
    with pytest.raises(UserError, match=r"Lanczos.*omit --resize-on device"):
        predict(dataclasses.replace(config, checkpoint=str(folder), out=str(tmp_path / "d"), resize_on="device"))
    assert not (tmp_path / "d").exists()
    out, _ = scored(config, tmp_path, "cpu", limit=2)
    with pytest.raises(UserError, match="--resize-on: cpu → device"):
        predict(dataclasses.replace(config, out=out, limit=2, resize_on="device"))

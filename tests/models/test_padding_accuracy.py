"""Effect of padding and of the place of the resize on the AP of a trained model, on images of many sizes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    DeformableDetrImageProcessor,
    ResNetConfig,
)

from raydet import EvaluateConfig, PredictConfig, TrainConfig, evaluate, predict, train
from raydet.models.geometry import ResizeRule
from raydet.preparation.sources.shapes import CATEGORIES, Split, draw
from raydet.tables.table import open_table
from tests.small_sets import QUICK_RECIPE, write_drawn

SHORTEST, LONGEST = 128, 214
DRAWN_PX = 192


def stretched_picture(split: Split, number: int) -> tuple[np.ndarray, list[list[float]], tuple[int, ...]]:
    """Draw an image of random size and aspect ratio; return pixels, boxes (x, y, width, height), categories."""
    drawn = draw(1, split, number, image_size=DRAWN_PX, max_shapes=6)
    rng = np.random.default_rng((1, number))
    height = int(rng.integers(110, 260))
    width = int(np.clip(height * np.exp(rng.uniform(-0.5, 0.5)), 100, 300))
    stretched = Image.fromarray(drawn.pixels).resize((width, height), Image.Resampling.BICUBIC)
    scale = np.tile([width / DRAWN_PX, height / DRAWN_PX], 2)
    boxes = (np.array(drawn.objects.boxes_xywh, dtype=float).reshape(-1, 4) * scale).tolist()
    return np.asarray(stretched), boxes, tuple(drawn.objects.categories)


def write_pictures(uri: Path, split: Split, num_images: int) -> str:
    """Write an images table of such images."""
    return write_drawn(uri, (stretched_picture(split, number) for number in range(num_images)))


def save_model(folder: Path) -> str:
    """Build a model with random weights that pads to the largest image of a batch, like those on the Hub."""
    stages: dict[str, Any] = {"out_features": ["stage2", "stage3", "stage4"]}
    backbone = ResNetConfig(
        embedding_size=32,
        hidden_sizes=[32, 64, 128, 256],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        **stages,
    )
    config = DeformableDetrConfig(
        backbone_config=backbone,
        d_model=64,
        encoder_layers=1,
        decoder_layers=3,
        encoder_ffn_dim=256,
        decoder_ffn_dim=256,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        num_queries=50,
        two_stage=True,
        two_stage_num_proposals=50,
        with_box_refine=True,
        dropout=0.0,
        id2label={number: category.name for number, category in enumerate(CATEGORIES)},
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        DeformableDetrForObjectDetection(config).save_pretrained(folder)
    size = {"shortest_edge": SHORTEST, "longest_edge": LONGEST}
    DeformableDetrImageProcessor(size=size).save_pretrained(folder)
    return str(folder)


def test_pictures_have_many_sizes_and_the_boxes_of_their_shapes(tmp_path: Path) -> None:
    table = open_table(write_pictures(tmp_path / "few", "val", 12), "images")
    rows = table.read(["width", "height", "objects"]).to_pylist()
    rule = ResizeRule(mode="keep_aspect", shortest=SHORTEST, longest=LONGEST)
    seen = {rule.target_size_hw((row["height"], row["width"])) for row in rows}
    assert len(seen) > 8 and any(rule.padded_size_hw(size_hw) != size_hw for size_hw in seen)
    boxes = [(box, row) for row in rows for box in row["objects"]["bbox"]]
    assert len(boxes) > 12
    for (left, top, width, height), row in boxes:
        assert 0.1 * row["width"] < width < 0.5 * row["width"] and left + width <= row["width"] + 1e-6
        assert 0.1 * row["height"] < height < 0.5 * row["height"] and top + height <= row["height"] + 1e-6


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.usefixtures("ray_cluster")
def test_neither_padding_nor_the_place_of_the_resize_changes_ap(tmp_path: Path) -> None:
    scored = write_pictures(tmp_path / "val", "val", 2000)
    trained = train(
        TrainConfig(
            train_data=write_pictures(tmp_path / "train", "train", 1600),
            val_data=write_pictures(tmp_path / "few", "val", 64),
            out=str(tmp_path / "run"),
            model=save_model(tmp_path / "model"),
            epochs=4,
            validate_every=4,
            **QUICK_RECIPE,
        )
    )
    runs: dict[str, dict[str, Any]] = {"padded": {}, "alone": {"pad_batches": False}, "device": {"resize_on": "device"}}
    ap = {}
    for name, options in runs.items():
        out = str(tmp_path / f"detections-{name}")
        found = predict(PredictConfig(checkpoint=trained.checkpoint, data=scored, out=out, **options))
        ap[name] = evaluate(EvaluateConfig(truth=scored, detections=found.out)).result.AP or 0.0
    print(f"AP padded {ap['padded']:.4f}, each size by itself {ap['alone']:.4f}, resized there {ap['device']:.4f}")
    assert ap["alone"] > 0.15
    assert ap["padded"] == pytest.approx(ap["alone"], abs=0.001)
    assert ap["device"] == pytest.approx(ap["padded"], abs=0.001)

"""The vectors that detections keep equal the outputs of plain transformers, in every family."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from raydet.engines.best import best_detections
from raydet.engines.torch_engine import TorchEngine
from raydet.models.detector import Detections, Detector, QueryVectors
from raydet.models.families import FAMILIES
from raydet.models.geometry import Image
from raydet.models.loading import build_detector
from raydet.models.small import SMALL_MODELS
from raydet.tables.schema import Category

CATEGORIES = (Category(3, "cat"), Category(7, "dog"), Category(90, "toothbrush"))
TINY = sorted(set(SMALL_MODELS) - {"rt_detr_v2_small"})


def images() -> list[Image]:
    """Pictures of two shapes, of which one is padded in the families that keep the aspect ratio."""
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (*size_hw, 3), dtype=np.uint8) for size_hw in ((96, 96), (96, 30))]


def vary(detector: Detector) -> None:
    """Change the weights so that queries differ, as they hardly do in an untrained model."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in detector.model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def features_of(detector: Detector, inputs: dict[str, Tensor], outputs: Any) -> list[tuple[Tensor, Tensor]]:
    """Return the maps of the encoder's features, each [D, N], and their masks, [N], for each image."""
    model: Any = detector.model
    kind, mask = detector.family.model_type, inputs.get("pixel_mask")
    if kind == "yolos":
        patches = outputs.last_hidden_state[:, 1 : -detector.num_queries]
        return [(one.T, torch.ones(len(one), dtype=torch.bool)) for one in patches]
    if kind in ("lw_detr", "rf_detr"):
        maps = model.model.backbone(inputs["pixel_values"], mask)
        maps = [maps[0]] if kind == "rf_detr" else [one for one, _ in maps]
    elif detector.family.uses_pixel_mask:
        hidden = model(**inputs, output_hidden_states=True).encoder_last_hidden_state
        shapes = _shapes(kind, inputs["pixel_values"])
        maps = [
            part.transpose(1, 2).unflatten(2, shape)
            for part, shape in zip(hidden.split([h * w for h, w in shapes], dim=1), shapes, strict=True)
        ]
    else:
        projections = model.model.decoder_input_proj
        maps = [project(one) for project, one in zip(projections, outputs.encoder_last_hidden_state, strict=True)]
    masks = [
        torch.ones((len(one), *one.shape[2:]), dtype=torch.bool)
        if mask is None
        else functional.interpolate(mask[None].float(), size=one.shape[2:])[0].bool()
        for one in maps
    ]
    return [
        (torch.cat([one[image].flatten(1) for one in maps], dim=1), torch.cat([one[image].flatten() for one in masks]))
        for image in range(len(inputs["pixel_values"]))
    ]


def _shapes(kind: str, pixels: Tensor) -> list[tuple[int, int]]:
    """Return heights and widths of the encoder's maps: the last level, or four of them for Deformable DETR."""
    height, width = pixels.shape[2:]
    strides = (8, 16, 32, 64) if kind == "deformable_detr" else (32,)
    return [(-(-height // stride), -(-width // stride)) for stride in strides]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", TINY)
def test_they_are_the_outputs_of_transformers(name: str) -> None:
    detector = build_detector(name, CATEGORIES, image_size=96, seed=0)
    vary(detector)
    detector.model.eval()
    engine = TorchEngine(detector, keep=["class_scores", "embedding"])
    parts = engine.prepare(images())
    found = engine.predict(parts)
    plain = TorchEngine(detector).predict(parts)
    for part in parts:
        inputs = detector.model_inputs(part.batch)
        with torch.inference_mode():
            outputs = detector.model(**inputs)
            features = features_of(detector, inputs, outputs)
        softmax, hidden = detector.family.softmax, outputs.last_hidden_state[:, -detector.num_queries :]
        scores = outputs.logits.softmax(-1)[..., :-1] if softmax else outputs.logits.sigmoid()
        for number, place in enumerate(part.places):
            one = found[place]
            assert one.vectors is not None and one.queries is not None
            values, is_image = features[number]
            mean = values[:, is_image].mean(dim=1)
            for kept, expected in (
                (one.vectors.class_scores, scores[number]),
                (one.vectors.embedding, hidden[number]),
                (one.vectors.image_embedding, mean),
            ):
                assert kept is not None and kept.dtype == np.float16
                np.testing.assert_allclose(kept, expected.numpy(), rtol=2e-3, atol=2e-4)
            # Each detection is one class of its query.
            assert one.vectors.class_scores is not None
            own = one.vectors.class_scores[one.queries, one.categories]
            np.testing.assert_allclose(own, one.scores, rtol=2e-3, atol=1e-5)
            np.testing.assert_array_equal(one.boxes_xywh, plain[place].boxes_xywh)
            np.testing.assert_array_equal(one.scores, plain[place].scores)
            assert plain[place].vectors is None
    if detector.family.uses_pixel_mask and detector.resize_rule.mode == "keep_aspect":
        assert len(parts) == 1 and any(not mask.all() for _, mask in features)


def test_queries_are_numbered_by_their_first_detection() -> None:
    embedding = np.arange(10, dtype=np.float16).reshape(5, 2)
    vectors = QueryVectors(embedding=embedding, image_embedding=np.ones(2, np.float16))
    boxes = np.zeros((4, 4))
    found = Detections(boxes, np.array([0.9, 0.8, 0.7, 0.6]), np.zeros(4, np.int64), np.array([3, 1, 3, 0]), vectors)
    used = found.take(np.array([0, 1, 2])).with_used_queries()
    assert used.queries is not None and used.vectors is not None and used.vectors.embedding is not None
    assert used.queries.tolist() == [0, 1, 0]
    assert used.vectors.embedding.tolist() == [[6, 7], [2, 3]]
    assert used.vectors.image_embedding is vectors.image_embedding
    nothing = found.take(np.zeros(0, np.int64)).with_used_queries()
    assert nothing.queries is not None and nothing.vectors is not None and nothing.vectors.embedding is not None
    assert nothing.queries.tolist() == [] and nothing.vectors.embedding.shape == (0, 2)


def test_numbers_that_no_table_may_hold_are_replaced() -> None:
    embedding = torch.tensor([[[torch.nan, 1e9, -torch.inf, 0.5]]])
    logits, boxes_cxcywh = torch.zeros(1, 1, 3), torch.full((1, 1, 4), 0.5)
    (found,) = best_detections(FAMILIES["rt_detr"], logits, boxes_cxcywh, [(8, 8)], vectors={"embedding": embedding})()
    assert found.vectors is not None and found.vectors.embedding is not None
    assert found.vectors.embedding.tolist() == [[0.0, 65504.0, -65504.0, 0.5]]

"""Published configurations at their real size, with random weights: loading, a step, saving, and the same boxes."""

import gc
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForObjectDetection

from raydet.engines.torch_engine import TorchEngine
from raydet.models.collate import collate
from raydet.models.detector import AUTOCAST_DTYPES
from raydet.models.families import FAMILIES
from raydet.models.loading import build_detector, load_detector
from raydet.models.step import StepSetting, apply_gradients, compute_gradients
from raydet.tables.schema import Category
from tests.models.published import COCO_80, MODELS
from tests.random_examples import random_examples

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(autouse=True)
def freed() -> Iterator[None]:
    """Free the model of a test before the next one is built."""
    yield
    gc.collect()


def test_every_family_has_a_published_model() -> None:
    assert {model.model_type for model in MODELS.values()} == FAMILIES.keys()


@pytest.mark.parametrize("name", MODELS)
def test_published_configuration_builds_learns_and_scores(name: str, tmp_path: Path) -> None:
    published = MODELS[name]
    folder, side = tmp_path / "published", published.smallest_size
    config = published.make_config()
    torch.manual_seed(0)
    model = AutoModelForObjectDetection.from_config(config)
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6) == published.millions
    model.save_pretrained(folder)
    published.make_processor().save_pretrained(folder)
    del model
    loaded = load_detector(str(folder))
    assert [category.name for category in loaded.categories] == list(published.labels)
    del loaded

    names = COCO_80 if len(published.labels) > 2 else published.labels
    categories = [Category(number, label) for number, label in enumerate(names)]
    detector = build_detector(str(folder), categories, image_size=side, seed=0)
    notes = [note for note in detector.notes if "start anew" in note or "mean of" in note]
    assert not notes
    optimizer = torch.optim.AdamW(detector.model.parameters(), 1e-4, fused=True)
    setting = StepSetting(device=torch.device("cpu"), autocast_dtype=AUTOCAST_DTYPES["fp32"], world_size=1)
    detector.model.train()
    result = compute_gradients(detector, detector.model, [collate(random_examples(1, side))], setting)
    norm = apply_gradients(detector.model, optimizer, max_grad_norm=0.1)
    assert 0 < float(norm) < math.inf and all(torch.isfinite(value) for value in result.terms.values())

    detector.save(str(tmp_path / "tuned"))
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (90, 120, 3), dtype=np.uint8))
    expected = _scores(TorchEngine(detector), picture)
    del detector, optimizer
    assert len(expected)
    np.testing.assert_allclose(_scores(TorchEngine(load_detector(str(tmp_path / "tuned"))), picture), expected, 1e-4)
    post_processor = getattr(transformers, FAMILIES[published.model_type].processor)()
    plain = _scores_of_transformers(tmp_path / "tuned", picture, post_processor)
    np.testing.assert_allclose(plain, expected, 2e-3)


def _scores(engine: TorchEngine, picture: Image.Image) -> Any:
    (found,) = engine.predict(engine.prepare([np.asarray(picture)]))
    return found.scores


def _scores_of_transformers(folder: Path, picture: Image.Image, post_processor: Any) -> Any:
    model = AutoModelForObjectDetection.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    with torch.inference_mode():
        outputs = model(**processor(images=picture, return_tensors="pt"))
    sizes = [(picture.height, picture.width)]
    (found,) = post_processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=sizes)
    return np.sort(found["scores"].numpy())[::-1]

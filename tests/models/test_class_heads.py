"""Class heads: rows kept by name, averaged or new, and the loss with which a model starts."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from raydet.common.errors import UserError
from raydet.engines.torch_engine import TorchEngine
from raydet.models.class_heads import class_tensor_names
from raydet.models.collate import Example, collate
from raydet.models.detector import Detector
from raydet.models.loading import build_detector, load_detector
from raydet.models.losses.global_batch import compute_loss, local_normaliser
from raydet.models.small import SMALL_MODELS
from raydet.tables.schema import Category
from tests.random_examples import random_examples

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = sorted(set(SMALL_MODELS) - {"rt_detr_v2_small"})
WITH_SCORE_HEAD = ("rt_detr", "d_fine", "deimv2", "lw_detr", "rf_detr")
SOFTMAX = ("detr_", "table_", "yolos_")
PRIOR_BIAS = -4.59511985
OLD = ("red_car", "Dog", "N/A", "bird")


def classes(names: Sequence[str]) -> list[Category]:
    return [Category(index, name) for index, name in enumerate(names)]


def save(name: str, folder: Path, names: Sequence[str] = OLD) -> dict[str, Tensor]:
    """Save a model whose weights are all different, and return them."""
    detector = build_detector(name, classes(names), image_size=96, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in detector.model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    detector.save(str(folder))
    return detector.model.state_dict()


def rebuild(folder: Path, names: Sequence[str], **options: Any) -> Detector:
    return build_detector(str(folder), classes(names), image_size=96, seed=1, **options)


def class_tensors(detector: Detector) -> dict[str, Tensor]:
    config, state = detector.model.config, detector.model.state_dict()
    names = class_tensor_names(config, lambda config: type(detector.model)(config))
    return {name: state[name] for name in names}


@pytest.mark.parametrize("name", TINY)
def test_rows_of_each_class(name: str, tmp_path: Path) -> None:
    before = save(name, tmp_path)
    detector = rebuild(tmp_path, ["dog", "zebra", "red car", "wagon", "mouse"], class_mapping={"bird": "wagon"})
    sources, new = {0: 1, 2: 0, 3: 3}, (1, 4)
    tensors = class_tensors(detector)
    assert tensors
    for key, value in detector.model.state_dict().items():
        if key not in tensors:
            assert torch.equal(value, before[key]), key
            continue
        old = before[key]
        if name == "deformable_detr_two_stage_tiny" and "class_embed.2." in key:  # the first row means any object
            assert torch.equal(value[0], old[0])
            continue
        assert all(torch.equal(value[row], old[source]) for row, source in sources.items()), key
        assert torch.equal(value[5:], old[4:]), key  # no object, or padding
        for row in new:
            if "score_head" in key or "enc_out_class_embed" in key:
                torch.testing.assert_close(value[row], old[[0, 1, 3]].mean(0))
            elif key.endswith("bias") and not name.startswith(SOFTMAX):
                assert float(value[row]) == pytest.approx(PRIOR_BIAS)
    assert detector.model.config.id2label == dict(enumerate(["dog", "zebra", "red car", "wagon", "mouse"]))


@pytest.mark.parametrize("name", TINY)
def test_the_run_is_told_in_words(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(name, tmp_path)
    with caplog.at_level(logging.INFO, "raydet"):
        notes = rebuild(tmp_path, ["Dog", "zebra"]).notes
    assert notes[0] == "classes that keep the checkpoint's weights: Dog"
    assert notes[-1].startswith("classes that start anew")
    assert any("mean of the checkpoint's 3 classes" in note for note in notes) == name.startswith(WITH_SCORE_HEAD)
    assert all(note in caplog.text for note in notes)
    assert rebuild(tmp_path, OLD).notes == ()


@pytest.mark.parametrize("name", ["rt_detr_v2_tiny", "detr_tiny", "lw_detr_tiny", "deformable_detr_two_stage_tiny"])
def test_another_order_of_the_same_classes_gives_the_same_boxes(name: str, tmp_path: Path) -> None:
    save(name, tmp_path, ("cat", "dog", "bird"))
    first, second = load_detector(str(tmp_path)), rebuild(tmp_path, ["bird", "CAT", "dog"])
    examples = random_examples(2, 96)
    of_first, of_second = (
        engine.predict(engine.prepare_resized(examples)) for engine in map(TorchEngine, (first, second))
    )
    for one, other in zip(of_first, of_second, strict=True):
        np.testing.assert_allclose(one.scores, other.scores, atol=1e-6)
        np.testing.assert_allclose(one.boxes_xywh[:5], other.boxes_xywh[:5], atol=1e-3)
        own, others = (
            [detector.categories[index].name.lower() for index in found.categories[:5]]
            for detector, found in ((first, one), (second, other))
        )
        assert own == others


@pytest.mark.parametrize("name", ["detr_tiny", "conditional_detr_tiny", "rf_detr_tiny"])
def test_ninety_one_labels_become_eighty(name: str, tmp_path: Path) -> None:
    ids = sorted(set(range(1, 91)) - {12, 26, 29, 30, 45, 66, 68, 69, 71, 83})
    labels = [f"thing {index}" if index in ids else "N/A" for index in range(91)]
    before = save(name, tmp_path, labels)
    detector = rebuild(tmp_path, [f"Thing_{index}" for index in ids])
    assert len(ids) == 80 and len(detector.notes) == 1
    for key, value in class_tensors(detector).items():
        assert torch.equal(value[:80], before[key][ids]), key
        assert torch.equal(value[80:], before[key][91:]), key


def test_a_checkpoint_without_class_names_keeps_its_proposals(tmp_path: Path) -> None:
    before = save("rt_detr_v2_tiny", tmp_path, [f"LABEL_{index}" for index in range(3)])
    key = "model.enc_score_head.weight"
    detector = rebuild(tmp_path, ["LABEL_1", "cat"])
    for row in detector.model.state_dict()[key]:
        torch.testing.assert_close(row, before[key].mean(0))


def test_mapping_must_name_classes_of_both_sides(tmp_path: Path) -> None:
    save("detr_tiny", tmp_path)
    for mapping, message in (({"cow": "zebra"}, "cow.*red_car"), ({"dog": "cow"}, "training table.*cow.*zebra")):
        with pytest.raises(UserError, match=message):
            rebuild(tmp_path, ["zebra"], class_mapping=mapping)
    with pytest.raises(UserError, match="--class-mapping"):
        build_detector("detr_tiny", classes(["a"]), image_size=96, seed=0, class_mapping={"a": "a"})


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("num_classes", [1, 5, 80])
def test_a_model_from_scratch_starts_with_a_small_class_loss(name: str, num_classes: int) -> None:
    detector = build_detector(name, classes([f"thing {index}" for index in range(num_classes)]), image_size=96, seed=0)
    detector.model.train()
    generator = np.random.default_rng(0)
    batch = collate(
        [
            Example(
                image_id=number,
                image=generator.integers(0, 256, (96, 96, 3), dtype=np.uint8),
                original_size_hw=(96, 96),
                boxes=generator.uniform(0.2, 0.4, (3, 4)).astype(np.float32),
                categories=generator.integers(0, num_classes, 3),
            )
            for number in range(2)
        ]
    )
    local = local_normaliser(detector, batch)
    terms = compute_loss(detector, batch, global_normaliser=local, local=local, world_size=1).terms
    of_classes = [float(value) for key, value in terms.items() if key.startswith(("loss_ce", "loss_vfl", "loss_mal"))]
    assert of_classes and sum(of_classes) < 10
    if not name.startswith(SOFTMAX):
        biases = [value for key, value in class_tensors(detector).items() if key.endswith("bias")]
        assert all(torch.allclose(value, torch.tensor(PRIOR_BIAS)) for value in biases)

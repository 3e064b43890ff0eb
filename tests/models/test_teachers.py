"""Teachers teach soft classes and boxes, with the same gradient however the batch is cut."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.loss.loss_for_object_detection import HungarianMatcher
from transformers.loss.loss_rt_detr import RTDetrHungarianMatcher

from raydet.models.collate import Batch, collate
from raydet.models.detector import Detector
from raydet.models.losses import teachers
from raydet.models.losses.global_batch import compute_loss, local_normaliser
from raydet.models.losses.teachers import taught_weight, teacher_terms
from raydet.models.step import StepSetting, compute_gradients, step_normaliser
from tests.models.test_loss import (
    CATEGORIES,
    SINGLE_ONLY,
    TINY,
    Gradient,
    build,
    examples,
    gradient_of,
    relative_difference,
    teach,
)
from tests.models.test_partial_labels import SOFTMAX, class_scores

pytestmark = pytest.mark.usefixtures("one_thread")

NUM_CLASSES = len(CATEGORIES)


def terms_of(detector: Detector, batch: Batch, *, last_layer: bool = False, **labelled: Any) -> dict[str, Tensor]:
    dtype = detector.model.dtype
    labels = [{**label, "boxes": label["boxes"].to(dtype), **labelled} for label in batch.labels]
    outputs = detector.model(**detector.model_inputs(batch, dtype), labels=labels)
    if last_layer:
        outputs.auxiliary_outputs = detector.model.loss_function.auxiliary = None
    return teacher_terms(detector, outputs, labels, weight=taught_weight(batch))


def step_gradient(detector: Detector, parts: Sequence[Batch]) -> tuple[Gradient, dict[str, float]]:
    detector.model.zero_grad(set_to_none=True)
    setting = StepSetting(device=torch.device("cpu"), autocast_dtype=None, world_size=1)
    result = compute_gradients(detector, detector.model, parts, setting, total=step_normaliser(detector, parts))
    return gradient_of(detector.model), {name: float(value) for name, value in result.terms.items()}


@pytest.mark.parametrize("name", TINY)
def test_the_gradient_does_not_depend_on_the_division_of_the_batch(name: str) -> None:
    """Compare eight images at once with two and four parts; some images have no boxes, some no teacher."""
    is_double = name not in SINGLE_ONLY
    torch.set_default_dtype(torch.float64 if is_double else torch.float32)
    try:
        detector = build(name)
        items, counts = examples((1, 0, 2, 3, 0, 1, 2, 0)), (2, 3, 0, 1, 5, 0, 2, 4)

        def parts(num_parts: int) -> list[Batch]:
            size = len(items) // num_parts
            whole = teach(collate(items), counts)
            for label in whole.labels[4:6]:
                label["labelled"] = torch.tensor([0])
            for name_ in [name_ for name_ in whole.labels[7] if name_.startswith("teacher")]:
                del whole.labels[7][name_]
            cut = [collate(items[start : start + size]) for start in range(0, len(items), size)]
            for number, part in enumerate(cut):
                part.labels[:] = whole.labels[number * size : (number + 1) * size]
            return cut

        once, terms = step_gradient(detector, parts(1))
        assert all(terms[f"teacher_{term}"] > 0 for term in ("class", "bbox", "giou"))
        for num_parts in (2, 4):
            cut, cut_terms = step_gradient(detector, parts(num_parts))
            tolerance = 1e-10 if is_double else 2e-3
            assert relative_difference(once, cut) < tolerance
            for term, value in terms.items():
                assert cut_terms[term] == pytest.approx(value, rel=1e-5 if is_double else 1e-3)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", TINY)
def test_what_the_student_already_says_costs_nothing(name: str) -> None:
    """Let the student learn its own final boxes and scores: all terms vanish, and their gradient."""
    detector = build(name)
    batch = collate(examples((2, 1)))
    with torch.no_grad():
        detector.model.eval()
        outputs = detector.model(**detector.model_inputs(batch, torch.float32))
        detector.model.train()
    for image, label in enumerate(batch.labels):
        scores = outputs.logits[image]
        scores = scores.softmax(-1)[:, :-1] if name in SOFTMAX else scores.sigmoid()
        label["teacher_boxes"], label["teacher_scores"] = outputs.pred_boxes[image][:6], scores[:6]
        label["teacher_owners"], label["teacher_weights"] = torch.zeros(6, dtype=torch.int64), torch.ones(1)
        label["teacher_known"] = torch.ones((1, NUM_CLASSES), dtype=torch.bool)
    num_groups = getattr(detector.model.config, "group_detr", 1)
    detector.model.config.num_denoising = 0
    with torch.no_grad():
        terms = terms_of(detector, batch, last_layer=True)
    if num_groups == 1:  # the other groups have queries of their own
        assert all(float(value) == pytest.approx(0, abs=2e-3) for value in terms.values()), terms
    label = batch.labels[0]
    other = {
        **label,
        "teacher_boxes": (label["teacher_boxes"] * 0.7 + 0.2),
        "teacher_scores": 1 - label["teacher_scores"],
    }
    batch.labels[0] = other
    with torch.no_grad():
        changed = terms_of(detector, batch, last_layer=True)
    assert all(float(changed[term]) > float(terms[term]) + 1e-3 for term in terms)


@pytest.mark.parametrize("name", ["rt_detr_tiny", "detr_tiny"])
def test_the_soft_class_cost_of_a_certain_teacher_is_that_of_transformers(name: str) -> None:
    detector = build(name)
    config: Any = detector.model.config
    rng = torch.Generator().manual_seed(3)
    logits = torch.randn((1, 20, NUM_CLASSES + (name in SOFTMAX)), generator=rng)
    boxes = torch.rand((1, 20, 4), generator=rng) * 0.4 + 0.1
    targets, classes = torch.rand((7, 4), generator=rng) * 0.4 + 0.1, torch.randint(NUM_CLASSES, (7,), generator=rng)
    matcher: Any
    if name in SOFTMAX:
        matcher = HungarianMatcher(config.class_cost, config.bbox_cost, config.giou_cost)
    else:
        matcher = RTDetrHungarianMatcher(config)
    ((queries, places),) = matcher(
        {"logits": logits, "pred_boxes": boxes}, [{"class_labels": classes, "boxes": targets}]
    )
    scores = torch.nn.functional.one_hot(classes, NUM_CLASSES).float()
    ours = teachers._matched(detector, logits[0], boxes[0], targets, scores)
    assert [one.tolist() for one in ours] == [queries.tolist(), places.tolist()]
    # Of more boxes than queries, those with the highest scores are matched, each to the query that suits it best.
    scores = scores * torch.tensor([0.1, 0.9, 0.2, 0.8, 0.3, 0.1, 0.1])[:, None]
    few = teachers._matched(detector, logits[0, :3], boxes[0, :3], targets, scores)
    assert sorted(few[1].tolist()) == [1, 3, 4]


@pytest.mark.parametrize("name", ["rt_detr_tiny", "d_fine_tiny", "lw_detr_tiny", "deformable_detr_tiny", "detr_tiny"])
def test_classes_that_the_teacher_does_not_know_learn_nothing(name: str) -> None:
    detector = build(name)
    batch = teach(collate(examples((2, 1))), (4, 3), num_teachers=1)
    for label in batch.labels:
        label["teacher_scores"][:, 1] = 0
        label["teacher_known"][:, 1] = False
    labels = [{**label, "labelled": torch.tensor([0])} for label in batch.labels]
    outputs = detector.model(**detector.model_inputs(batch, torch.float32), labels=labels)
    outputs.logits.retain_grad()
    sum(teacher_terms(detector, outputs, labels, weight=taught_weight(batch)).values(), torch.zeros(())).backward()
    grad = outputs.logits.grad
    if name in SOFTMAX:  # probability may move between the unknown class and "no object"
        both = outputs.logits.detach().softmax(-1)[..., [1, 3]]
        torch.testing.assert_close(grad[..., [1, 3]] * both.flip(-1), (grad[..., [1, 3]] * both.flip(-1)).flip(-1))
    else:
        assert (grad[..., 1] == 0).all()
    assert (grad[..., 0] != 0).any() and (grad[..., 2] != 0).any()


@pytest.mark.parametrize("name", ["rt_detr_tiny", "deformable_detr_tiny", "detr_tiny"])
def test_only_images_without_labels_learn_from_what_the_teacher_did_not_find(name: str) -> None:
    """Check with a teacher that found nothing: labelled images learn nothing from it, others that they are empty."""
    detector = build(name)
    batch = teach(collate(examples((2, 1))), (0, 0), num_teachers=1)
    assert taught_weight(batch) == 0.0
    with torch.no_grad():
        labelled = terms_of(detector, batch)
        nothing = terms_of(detector, batch, labelled=torch.zeros(0, dtype=torch.int64))
    assert all(float(value) == 0 for value in labelled.values())
    assert float(nothing["teacher_class"]) > 0 and float(nothing["teacher_bbox"]) == 0
    for label in batch.labels:
        label["teacher_weights"] = torch.zeros(1)
    with torch.no_grad():
        absent = terms_of(detector, batch, labelled=torch.zeros(0, dtype=torch.int64))
    assert all(float(value) == 0 for value in absent.values())


def test_a_weight_scales_the_terms_and_an_equal_second_teacher_changes_nothing() -> None:
    detector = build("rt_detr_tiny")
    one, both = (teach(collate(examples((0, 0))), (4, 4), num_teachers=1) for _ in range(2))
    for label in both.labels:
        for name in ("teacher_boxes", "teacher_scores"):
            label[name] = torch.cat([label[name], label[name]])
        label["teacher_owners"] = torch.arange(8) // 4
        label["teacher_weights"] = torch.ones(2)
        label["teacher_known"] = torch.ones((2, NUM_CLASSES), dtype=torch.bool)
    assert taught_weight(both) == pytest.approx(2 * taught_weight(one))
    assert taught_weight(one) > 1
    with torch.no_grad():
        alone = terms_of(detector, one)
        for name, value in terms_of(detector, both).items():
            assert float(value) == pytest.approx(float(alone[name]), rel=1e-4)
        for label in one.labels:
            label["teacher_weights"] = torch.full((1,), 0.25)
        for name, value in terms_of(detector, one).items():
            assert float(value) == pytest.approx(0.25 * float(alone[name]), rel=1e-4)


def test_a_teacher_says_nothing_about_classes_that_it_does_not_know_where_it_found_nothing() -> None:
    detector = build("rt_detr_tiny")
    batch = teach(collate(examples((0, 0))), (0, 0), num_teachers=1)
    labels = [{**label, "labelled": torch.zeros(0, dtype=torch.int64)} for label in batch.labels]
    for label in labels:
        label["teacher_known"] = torch.tensor([[True, False, False]])
    outputs = detector.model(**detector.model_inputs(batch, torch.float32), labels=labels)
    outputs.logits.retain_grad()
    sum(teacher_terms(detector, outputs, labels, weight=0.0).values(), torch.zeros(())).backward()
    grad = outputs.logits.grad
    assert (grad[..., 0] != 0).all() and (grad[..., 1:] == 0).all()


@pytest.mark.parametrize("name", TINY)
def test_every_layer_of_an_unlabelled_image_learns_the_scores_of_a_teacher(name: str) -> None:
    """Check, beside a labelled image, with denoising, that no layer's scores have become constants."""
    detector = build(name, is_deterministic=False)
    batch = teach(collate(examples((0, 2))), (5, 3), num_teachers=1)
    batch.labels[0]["labelled"] = torch.zeros(0, dtype=torch.int64)
    with class_scores(detector) as scores:
        result = compute_loss(
            detector,
            batch,
            global_normaliser=step_normaliser(detector, [batch]),
            local=local_normaliser(detector, batch),
            world_size=1,
        )
        result.total.backward()
    grads = [one.grad for one in scores if one.grad is not None]
    of_unlabelled = [grad[0] if grad.shape[0] == len(batch) else grad[:, 0] for grad in grads]
    # Beside the final layer; some encoders propose objects of any class.
    assert sum(bool((grad != 0).any()) for grad in of_unlabelled) >= (1 if name == "yolos_tiny" else 2)
    assert float(result.terms["teacher_class"]) < 30

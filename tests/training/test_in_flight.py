"""Steps in flight: results are read late and in order, inputs arrive unchanged."""

import numpy as np
import pytest
import torch

from raydet.models.collate import LABELLED, TAUGHT, collate
from raydet.models.losses.global_batch import Normaliser
from raydet.training.in_flight import DeviceCopy, LateResults, PendingSum, StepInputs, StepOutcome
from raydet.training.state import Position
from tests.random_examples import random_examples


def _outcome(step: int, loss: float = 1.0, norm: float = 0.5) -> StepOutcome:
    terms = {"loss_a": torch.tensor(loss), "loss_b": torch.tensor(0.25)}
    return StepOutcome(Position(0, step), [step], {"learning_rate/head": 0.1}, terms, torch.tensor(norm))


def test_a_result_is_read_when_the_next_step_has_been_given_to_the_device() -> None:
    results = LateResults()
    assert results.report(keep=1) == [0.0, 0.0] and results.conclude([0.0, 0.0]) is None
    results.add(_outcome(0))
    assert results.report(keep=1) == [0.0, 0.0] and results.conclude([0.0, 0.0]) is None
    results.add(_outcome(1, loss=2.0))
    assert results.report(keep=1) == [0.0, 1.25]
    late = results.conclude([0.0, 3.5])
    assert late is not None and late.outcome.position == Position(0, 0) and late.loss == 3.5 and not late.is_skipped
    assert len(results) == 1 and results.report(keep=0) == [0.0, 2.25]


@pytest.mark.parametrize("loss", [1.0, float("nan")])
@pytest.mark.parametrize("norm", [float("inf"), float("nan")])
def test_a_step_whose_gradient_is_not_finite_was_skipped(loss: float, norm: float) -> None:
    results = LateResults()
    results.add(_outcome(0, loss=loss, norm=norm))
    assert results.report(keep=0) == [1.0, 0.0]
    late = results.conclude([1.0, 0.0])
    assert late is not None and late.is_skipped
    terms = late.outcome.read_terms()
    assert np.isnan(terms["loss_a"]) == np.isnan(loss) and terms["loss_b"] == 0.25
    results.add(_outcome(1))
    late = results.conclude(results.report(keep=0))
    assert late is not None and not late.is_skipped and late.loss == 1.25


def test_inputs_hold_the_divisors_and_what_else_was_summed() -> None:
    batches = [collate(random_examples(2, 32))]
    inputs = StepInputs(
        batches=DeviceCopy(torch.device("cpu")).start(batches),
        image_ids=[0, 1],
        sums=PendingSum([4.0, 4.5, 3.0, 20.0, 2.5, 1.0, 7.5], None),
    )
    assert inputs.normaliser == Normaliser(4.0, 4.5, 3.0, 20.0, 2.5) and inputs.others == [1.0, 7.5]
    assert inputs.batches.use() == batches


@pytest.mark.gpu
def test_batches_arrive_on_a_gpu_unchanged() -> None:
    batches = [collate(random_examples(2, 32))]
    batches[0].labels[1] |= {
        LABELLED: torch.tensor([0]),
        TAUGHT["class_scores"]: torch.rand((3, 2)).half(),
        TAUGHT["weights"]: torch.ones(1),
    }
    for original, copied in zip(batches, DeviceCopy(torch.device("cuda")).start(batches).use(), strict=True):
        assert copied.pixels.is_cuda and torch.equal(copied.pixels.cpu(), original.pixels)
        for mine, theirs in zip(copied.labels, original.labels, strict=True):
            for name, value in theirs.items():
                np.testing.assert_array_equal(mine[name].cpu().numpy(), value.numpy())

"""The plan of a run: every row once an epoch, the same steps for any number of workers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raydet.ordering import RunPlan, augmentation_seed


def _plan(**changes: object) -> RunPlan:
    values: dict[str, object] = {
        "train_groups": ((7, 100), (5, 100), (9, 100), (2, 100)),
        "num_val": 11,
        "batch_size": 4,
        "accumulate": 1,
        "epochs": 3,
        "seed": 5,
        "window_bytes": 200,
        "validate_every": 1,
        "validate_batch_size": 3,
    }
    return RunPlan(**{**values, **changes})  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(
    groups=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 300)), min_size=1, max_size=6),
    batch_size=st.integers(1, 12),
    accumulate=st.integers(1, 3),
    world_size=st.integers(1, 4),
    window_bytes=st.integers(1, 500),
)
def test_every_row_once_an_epoch_and_steps_do_not_depend_on_workers(
    groups: list[tuple[int, int]], batch_size: int, accumulate: int, world_size: int, window_bytes: int
) -> None:
    plan = _plan(
        train_groups=tuple(groups), batch_size=batch_size, accumulate=accumulate, window_bytes=window_bytes, epochs=2
    )
    for epoch in range(2):
        steps: dict[int, list[int]] = {}
        for segment in plan.segments():
            if segment.kind == "train" and segment.epoch == epoch:
                for micro_batch in plan.micro_batches(segment, world_size):
                    steps.setdefault(micro_batch.step, []).extend(micro_batch.rows)
        assert sorted(steps) == list(range(plan.steps_per_epoch))
        assert sorted(row for rows in steps.values() for row in rows) == list(range(plan.num_train))
        for step, rows in steps.items():
            assert sorted(rows) == sorted(plan.step_rows(epoch, step).tolist())


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_micro_batches_are_dealt_out_in_turn(world_size: int) -> None:
    plan = _plan(accumulate=2, batch_size=8)
    ranks = [micro_batch.rank for segment in plan.segments() for micro_batch in plan.micro_batches(segment, world_size)]
    assert ranks == [number % world_size for number in range(len(ranks))]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_validation_takes_every_row_once_in_batches_that_do_not_depend_on_workers(world_size: int) -> None:
    plan = _plan()
    segment = next(segment for segment in plan.segments() if segment.kind == "validate")
    batches = [micro_batch.rows for micro_batch in plan.micro_batches(segment, world_size)]
    assert [rows for rows in batches if rows] == [(0, 1, 2), (3, 4, 5), (6, 7, 8), (9, 10)]
    assert len(batches) == plan.validation_rounds(world_size) * world_size


def test_resuming_goes_on_with_the_same_steps() -> None:
    plan = _plan()

    def steps(**start: int) -> list[tuple[int, int, tuple[int, ...]]]:
        return [
            (micro_batch.epoch, micro_batch.step, micro_batch.rows)
            for segment in plan.segments(**start)
            for micro_batch in plan.micro_batches(segment, 2)
            if micro_batch.kind == "train"
        ]

    whole = steps()
    assert steps(start_epoch=1, start_step=3) == [item for item in whole if item[:2] >= (1, 3)]


def test_epochs_differ_and_seeds_differ_but_the_same_plan_repeats() -> None:
    plan, other = _plan(), _plan(seed=6)
    first, second = (np.concatenate([plan.step_rows(epoch, step) for step in range(6)]) for epoch in (0, 1))
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, np.concatenate([other.step_rows(0, step) for step in range(6)]))
    assert np.array_equal(first, np.concatenate([_plan().step_rows(0, step) for step in range(6)]))


def test_a_window_reads_its_row_groups_only() -> None:
    plan = _plan(window_bytes=100, batch_size=1)
    starts = np.cumsum([0, 7, 5, 9, 2])
    for segment in plan.segments():
        if segment.kind == "train":
            rows = [row for micro_batch in plan.micro_batches(segment, 1) for row in micro_batch.rows]
            assert len({int(np.searchsorted(starts, row, side="right")) for row in rows}) == 1


def test_validation_follows_every_nth_epoch_and_the_last() -> None:
    plan = _plan(epochs=5, validate_every=2)
    assert [epoch for epoch in range(5) if plan.validates(epoch)] == [1, 3, 4]


def test_augmentation_seed_depends_on_all_three() -> None:
    seeds = {augmentation_seed(seed, epoch, image) for seed in (0, 1) for epoch in (0, 1) for image in (0, 1, 2**52)}
    assert len(seeds) == 12
    assert augmentation_seed(1, 2, 3) == augmentation_seed(1, 2, 3)

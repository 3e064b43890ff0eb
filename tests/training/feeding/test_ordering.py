"""The plan of a run: every row once per epoch, the same steps for any number of workers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raydet.augmentation.view import augmentation_seed, scale_choice
from raydet.training.feeding.ordering import MIXUP_P, MOSAIC_P, RunPlan


def plan_of(**changes: object) -> RunPlan:
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
    plan = plan_of(
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


def test_a_segment_begins_where_the_view_changes() -> None:
    whole, broken = plan_of(epochs=2, batch_size=2), plan_of(epochs=2, batch_size=2, breaks=((0, 5), (1, 0), (1, 99)))
    segments = list(broken.segments())
    assert any(segment.first == 5 and segment.epoch == 0 for segment in segments)
    assert [one for segment in segments for one in broken.micro_batches(segment, 2)] == [
        one for segment in whole.segments() for one in whole.micro_batches(segment, 2)
    ]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_micro_batches_are_dealt_out_in_turn(world_size: int) -> None:
    plan = plan_of(accumulate=2, batch_size=8)
    ranks = [micro_batch.rank for segment in plan.segments() for micro_batch in plan.micro_batches(segment, world_size)]
    assert ranks == [number % world_size for number in range(len(ranks))]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_validation_takes_every_row_once_in_batches_that_do_not_depend_on_workers(world_size: int) -> None:
    plan = plan_of()
    segment = next(segment for segment in plan.segments() if segment.kind == "validate")
    batches = [micro_batch.rows for micro_batch in plan.micro_batches(segment, world_size)]
    assert [rows for rows in batches if rows] == [(0, 1, 2), (3, 4, 5), (6, 7, 8), (9, 10)]
    assert len(batches) == plan.validation_rounds(world_size) * world_size


def test_resuming_continues_with_the_same_steps() -> None:
    plan = plan_of()

    def steps(**start: int) -> list[tuple[int, int, tuple[int, ...]]]:
        return [
            (micro_batch.epoch, micro_batch.step, micro_batch.rows)
            for segment in plan.segments(**start)
            for micro_batch in plan.micro_batches(segment, 2)
            if micro_batch.kind == "train"
        ]

    whole = steps()
    assert steps(start_epoch=1, start_step=3) == [item for item in whole if item[:2] >= (1, 3)]


@settings(max_examples=40, deadline=None)
@given(
    groups=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 300)), min_size=1, max_size=6),
    batch_size=st.integers(1, 12),
    accumulate=st.integers(1, 2),
    before=st.integers(1, 4),
    after=st.integers(1, 4),
    data=st.data(),
)
def test_a_restart_with_other_workers_takes_exactly_the_rest_of_the_epoch(
    groups: list[tuple[int, int]], batch_size: int, accumulate: int, before: int, after: int, data: st.DataObject
) -> None:
    plan = plan_of(train_groups=tuple(groups), batch_size=batch_size, accumulate=accumulate, epochs=2)
    stopped = data.draw(st.integers(0, plan.steps_per_epoch))

    def rows(world_size: int, *, from_step: int, to_step: int) -> list[int]:
        return [
            row
            for segment in plan.segments(start_epoch=1, start_step=from_step)
            for micro_batch in plan.micro_batches(segment, world_size)
            if micro_batch.kind == "train" and from_step <= micro_batch.step < to_step
            for row in micro_batch.rows
        ]

    done = rows(before, from_step=0, to_step=stopped)
    rest = rows(after, from_step=stopped, to_step=plan.steps_per_epoch)
    assert sorted(done + rest) == list(range(plan.num_train))
    assert len(done) == min(stopped * batch_size, plan.num_train)


def test_a_restart_after_the_last_step_begins_with_the_validation() -> None:
    plan = plan_of()
    first = next(plan.segments(start_epoch=1, start_step=plan.steps_per_epoch))
    assert (first.kind, first.epoch) == ("validate", 1)


@settings(max_examples=60, deadline=None)
@given(num_val=st.integers(1, 300), fraction=st.floats(0.001, 1.0), world_size=st.integers(1, 4))
def test_a_part_of_the_validation_is_evenly_spread(num_val: int, fraction: float, world_size: int) -> None:
    plan = plan_of(num_val=num_val, validate_fraction=fraction)
    segment = next(segment for segment in plan.segments() if segment.kind == "validate")
    rows = [row for micro_batch in plan.micro_batches(segment, world_size) for row in micro_batch.rows]
    assert len(rows) == plan.num_validated == len(set(rows))
    assert rows[0] >= 0 and rows[-1] < num_val
    assert fraction * num_val <= len(rows) + 1e-5 and len(rows) < fraction * num_val + 1
    gaps = np.diff([*rows, num_val + rows[0]])
    assert gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize(
    ("fraction", "num_val", "expected"), [(0.07, 100, 7), (0.1, 11, 2), (1.0, 11, 11), (1e-9, 5, 1)]
)
def test_the_part_of_the_validation_is_rounded_up(fraction: float, num_val: int, expected: int) -> None:
    assert plan_of(num_val=num_val, validate_fraction=fraction).num_validated == expected


def test_partners_are_others_of_the_window_whoever_asks() -> None:
    plan = plan_of(train_groups=((40, 100), (50, 100), (60, 100), (30, 100)), batch_size=7, window_bytes=200)
    starts, chosen = np.cumsum([0, 40, 50, 60, 30]), {}
    for segment in plan.segments(start_epoch=1):
        if segment.kind != "train" or segment.epoch != 1:
            continue
        rows_of = {step: plan.step_rows(1, step).tolist() for step in range(segment.first, segment.last)}
        groups_read = {int(np.searchsorted(starts, row, side="right")) for rows in rows_of.values() for row in rows}
        for step, rows in rows_of.items():
            for row in rows:
                partners = chosen[row] = plan.partner_rows(1, step, row)
                used = [*partners.mosaic, *partners.mixup]
                assert row not in used and len(set(used)) == len(used)
                assert len(partners.mosaic) in (0, 3) and len(partners.mixup) in (0, 1)
                assert {int(np.searchsorted(starts, other, side="right")) for other in used} <= groups_read
    assert abs(np.mean([bool(one.mosaic) for one in chosen.values()]) - MOSAIC_P) < 0.12
    assert abs(np.mean([bool(one.mixup) for one in chosen.values()]) - MIXUP_P) < 0.1
    again = {row: plan.partner_rows(1, step, row) for step in range(26) for row in plan.step_rows(1, step).tolist()}
    other_epoch = {
        row: plan.partner_rows(0, step, row) for step in range(26) for row in plan.step_rows(0, step).tolist()
    }
    assert again == chosen != other_epoch


@pytest.mark.parametrize("num_rows", [1, 2, 4])
def test_small_tables_have_fewer_partners(num_rows: int) -> None:
    plan = plan_of(train_groups=((num_rows, 10),))
    for epoch in range(30):
        for row in range(num_rows):
            partners = plan.partner_rows(epoch, 0, row)
            assert len(partners.mosaic) in (0, min(3, num_rows - 1)) and row not in partners.mosaic + partners.mixup
            assert num_rows > 1 or partners.mixup == ()


def test_every_scale_has_its_share_of_the_steps() -> None:
    drawn = [scale_choice(3, epoch, step, 4) for epoch in range(5) for step in range(100)]
    assert min(np.bincount(drawn, minlength=4)) > 90 and max(drawn) == 3
    assert drawn == [scale_choice(3, epoch, step, 4) for epoch in range(5) for step in range(100)]
    assert drawn != [scale_choice(4, epoch, step, 4) for epoch in range(5) for step in range(100)]
    assert scale_choice(0, 0, 0, 1) == 0


def test_epochs_differ_and_seeds_differ_but_the_same_plan_repeats() -> None:
    plan, other = plan_of(), plan_of(seed=6)
    first, second = (np.concatenate([plan.step_rows(epoch, step) for step in range(6)]) for epoch in (0, 1))
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, np.concatenate([other.step_rows(0, step) for step in range(6)]))
    assert np.array_equal(first, np.concatenate([plan_of().step_rows(0, step) for step in range(6)]))


def test_a_window_reads_its_row_groups_only() -> None:
    plan = plan_of(window_bytes=100, batch_size=1)
    starts = np.cumsum([0, 7, 5, 9, 2])
    for segment in plan.segments():
        if segment.kind == "train":
            rows = [row for micro_batch in plan.micro_batches(segment, 1) for row in micro_batch.rows]
            assert len({int(np.searchsorted(starts, row, side="right")) for row in rows}) == 1


def test_validation_follows_every_nth_epoch_and_the_last() -> None:
    plan = plan_of(epochs=5, validate_every=2)
    assert [epoch for epoch in range(5) if plan.validates(epoch)] == [1, 3, 4]


def test_augmentation_seed_depends_on_all_three() -> None:
    seeds = {augmentation_seed(seed, epoch, image) for seed in (0, 1) for epoch in (0, 1) for image in (0, 1, 2**52)}
    assert len(seeds) == 12
    assert augmentation_seed(1, 2, 3) == augmentation_seed(1, 2, 3)

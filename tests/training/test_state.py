"""States of a run: written atomically, the newest ones kept, damaged ones skipped."""

from pathlib import Path

import pytest
import torch

from raydet.models.checkpoints import STATES_FOLDER
from raydet.training.state import (
    Position,
    TrainingState,
    discard_states,
    newest_state,
    parse_state,
    save_state,
    saved_states,
)


def _state(epoch: int, step: int) -> TrainingState:
    return TrainingState(
        position=Position(epoch, step),
        history=[{"epoch": 1, "AP": None}],
        meters=[{"losses": {"a": 0.1}, "unreadable": [3]}],
        model={"w": torch.full((3,), float(epoch))},
        buffers=[{"mean": torch.zeros(2)}, {"mean": torch.ones(2)}],
        parts={"optimizer": {"state": {0: {"step": torch.tensor(5.0)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}},
    )


def _newest(out: Path) -> TrainingState:
    data = newest_state(str(out))
    assert data is not None
    return parse_state(data, torch.device("cpu"))


def test_what_is_saved_is_what_comes_back(tmp_path: Path) -> None:
    save_state(str(tmp_path), _state(2, 7), keep=2)
    assert saved_states(str(tmp_path)) == ["00002-0000007.pt"]
    state = _newest(tmp_path)
    assert state.position == Position(2, 7) and state.history == [{"epoch": 1, "AP": None}]
    assert state.meters == _state(2, 7).meters and torch.equal(state.model["w"], torch.full((3,), 2.0))
    assert [float(each["mean"][0]) for each in state.buffers] == [0.0, 1.0]
    assert state.parts["optimizer"]["param_groups"] == [{"lr": 0.1, "params": [0]}]


def test_the_newest_are_kept_in_order_of_position(tmp_path: Path) -> None:
    for epoch, step in ((0, 9), (0, 10), (1, 0), (10, 0)):
        save_state(str(tmp_path), _state(epoch, step), keep=2)
    assert saved_states(str(tmp_path)) == ["00010-0000000.pt", "00001-0000000.pt"]


@pytest.mark.parametrize(
    ("since", "left"),
    [
        (Position(1, 3), ["00001-0000002.pt"]),  # the state before the useless ones
        (Position(1, 1), ["00002-0000000.pt", "00001-0000003.pt", "00001-0000002.pt"]),  # no other state is there
        (Position(0, 1), []),  # nothing is lost but the start
    ],
)
def test_useless_states_are_discarded_if_the_run_can_do_without(
    tmp_path: Path, since: Position, left: list[str]
) -> None:
    for epoch, step in ((1, 2), (1, 3), (2, 0)):
        save_state(str(tmp_path), _state(epoch, step), keep=None)
    discard_states(str(tmp_path), since=since)
    assert saved_states(str(tmp_path)) == left


@pytest.mark.parametrize("damage", ["cut", "emptied", "scribbled"])
def test_a_broken_state_is_passed_over(tmp_path: Path, damage: str) -> None:
    save_state(str(tmp_path), _state(1, 0), keep=2)
    save_state(str(tmp_path), _state(2, 0), keep=2)
    path = tmp_path / STATES_FOLDER / "00002-0000000.pt"
    data = path.read_bytes()
    path.write_bytes({"cut": data[: len(data) // 2], "emptied": b"", "scribbled": b"no state" * 100}[damage])
    assert _newest(tmp_path).position == Position(1, 0)


def test_no_state(tmp_path: Path) -> None:
    assert newest_state(str(tmp_path / "absent")) is None


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    save_state(str(tmp_path), _state(1, 0), keep=1)
    # A folder instead of the new file: the rename, the last step of the write, fails.
    (tmp_path / STATES_FOLDER / "00002-0000000.pt" / "x").mkdir(parents=True)
    with pytest.raises(OSError, match="00002-0000000"):
        save_state(str(tmp_path), _state(2, 0), keep=1)
    assert _newest(tmp_path).position == Position(1, 0)
    assert [path.name for path in (tmp_path / STATES_FOLDER).iterdir() if path.is_file()] == ["00001-0000000.pt"]

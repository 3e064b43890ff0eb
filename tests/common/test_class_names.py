"""Class names of two lists, matched."""

import pytest

from raydet.common.class_names import check_mapping, folded, is_unused, match_names
from raydet.common.errors import UserError


def test_case_underscores_and_spaces_do_not_matter() -> None:
    assert folded("  Traffic__Light ") == folded("traffic light") == "traffic light"
    assert match_names(["traffic_light", "DOG", "cat"], ["Dog", "traffic light"]) == [1, 0, None]


def test_an_equal_name_takes_precedence_and_an_ambiguous_one_matches_nothing() -> None:
    assert match_names(["cat", "Cat", "CAT"], ["Cat", "cat"]) == [1, 0, None]
    assert match_names(["a"], ["a", "a"]) == [0]


@pytest.mark.parametrize(("name", "index"), [("N/A", 3), ("", 0), ("LABEL_4", 4), ("__background__", 0), ("n/a", 1)])
def test_unused_names(name: str, index: int) -> None:
    assert is_unused(name, index)
    names = [f"class {number}" for number in range(index)] + [name]
    assert match_names(names, names)[-1] is None


@pytest.mark.parametrize(("name", "index"), [("background", 0), ("LABEL_4", 5), ("na", 0)])
def test_names_that_only_look_unused(name: str, index: int) -> None:
    assert not is_unused(name, index)


def test_mapping_takes_precedence() -> None:
    assert match_names(["wagon", "car"], ["car", "truck"], mapping={"Truck": "wagon"}) == [1, 0]
    assert match_names(["car"], ["car", "truck"], mapping={"truck": "car"}) == [1]


def test_mapping_is_checked() -> None:
    check_mapping({"Old": "new"}, ["new"], ["old"], where="it")
    for mapping, message in (({"x": "new"}, "it has no class x"), ({"old": "x"}, "table has no class x")):
        with pytest.raises(UserError, match=message):
            check_mapping(mapping, ["new"], ["old"], where="it")

"""Functions of a config that also take its options as keyword arguments."""

import inspect
import pickle

import pytest

import raydet
from raydet.common.errors import UserError
from raydet.config.fields import config, option, require_positive, with_options


@config
class BakeConfig:
    """Bake bread."""

    flour: str = option("kind of flour")
    minutes: int = option("time in the oven", 40)
    seeds: list[str] = option("seeds on top", default_factory=list)

    def __post_init__(self) -> None:
        require_positive(self, "minutes")


@with_options(BakeConfig)
def bake(config: BakeConfig, *, oven: str = "hot") -> str:
    """Bake bread."""
    return f"{config.flour} {config.minutes} {config.seeds} {oven}"


def test_a_config_or_its_options_beside_the_own_arguments() -> None:
    assert bake(BakeConfig(flour="rye")) == bake(flour="rye") == "rye 40 [] hot"
    assert bake(BakeConfig(flour="rye"), oven="cold") == "rye 40 [] cold"
    # Type checkers know either the options or the function's own arguments.
    assert bake(flour="rye", minutes=5, oven="cold") == "rye 5 [] cold"  # type: ignore[call-overload]
    assert bake(config=BakeConfig(flour="rye")) == "rye 40 [] hot"


def test_the_config_checks_the_options() -> None:
    with pytest.raises(UserError, match="--minutes must be above 0"):
        bake(flour="rye", minutes=0)


def test_unknown_and_missing_options_are_named() -> None:
    with pytest.raises(UserError, match=r"bake\(\) has no option minute; did you mean minutes\?"):
        bake(flour="rye", minute=5)  # type: ignore[call-overload]
    with pytest.raises(UserError, match=r"bake\(\) requires flour"):
        bake(minutes=5)
    with pytest.raises(TypeError, match="minutes"):
        bake(BakeConfig(flour="rye"), minutes=5)  # type: ignore[call-overload]


def test_help_shows_the_options_and_the_function_can_be_pickled() -> None:
    assert list(inspect.signature(bake).parameters) == ["config", "oven", "flour", "minutes", "seeds"]
    assert bake.__doc__ == "Bake bread."
    assert pickle.loads(pickle.dumps(bake)) is bake


def test_type_checkers_know_the_options_of_a_command() -> None:
    with pytest.raises(UserError, match="did you mean detections"):
        raydet.evaluate(truth="truth", detection="found")  # type: ignore[call-overload]
    with pytest.raises(UserError, match="no such truth"):
        raydet.evaluate(truth="nowhere", detections="found")

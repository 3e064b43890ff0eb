"""The table of commands, and the names that the package exports."""

import ast
import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest

import raydet
from raydet.cli.commands import COMMANDS
from raydet.common.notebook.showing import Shown
from raydet.config import field_names


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_a_function_of_its_config(name: str) -> None:
    command = COMMANDS[name]
    function = getattr(raydet, command.function)
    assert getattr(raydet, command.config.__name__) is command.config
    assert function.__module__ == command.module
    parameters = inspect.signature(function).parameters
    assert next(iter(parameters)) == "config"
    assert set(field_names(command.config)) <= set(parameters), "@with_options lets it take the options, too"
    assert issubclass(inspect.signature(function).return_annotation, Shown)


@pytest.mark.parametrize("name", COMMANDS)
def test_no_option_has_the_name_of_an_argument(name: str) -> None:
    function = inspect.unwrap(getattr(raydet, COMMANDS[name].function))
    assert set(inspect.signature(function).parameters).isdisjoint(field_names(COMMANDS[name].config))


def test_the_package_shows_functions_and_configs() -> None:
    shown = set(dir(raydet))
    assert {command.function for command in COMMANDS.values()} <= shown
    assert {command.config.__name__ for command in COMMANDS.values()} <= shown
    with pytest.raises(AttributeError, match="trian"):
        raydet.trian  # noqa: B018


def test_no_package_hides_a_function() -> None:
    """Check that no module has the name of a function, which importing the module would replace."""
    modules = {module.name for module in pkgutil.iter_modules(raydet.__path__)}
    assert modules.isdisjoint(command.function for command in COMMANDS.values())
    for command in COMMANDS.values():
        importlib.import_module(command.module)
        assert callable(getattr(raydet, command.function))


def test_type_checkers_see_the_names_of_the_table() -> None:
    tree = ast.parse(Path(str(raydet.__file__)).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    declared = {
        (node.module, alias.name) for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    functions = {(command.module, command.function) for command in COMMANDS.values()}
    configs = {("raydet.config", command.config.__name__) for command in COMMANDS.values()}
    others = {
        ("raydet.measuring.coco_ap", "CocoAP"),
        ("raydet.engines.in_memory.loaded", "load"),
        ("raydet.tables.table", "open_table"),
    }
    assert declared == functions | configs | others

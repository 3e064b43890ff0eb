"""YAML files and command-line options → a config, or a one-line error."""

import difflib
import json
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar

from raydet.common.console import write_out
from raydet.common.errors import UserError, one_line
from raydet.config.fields import (
    PAIRS,
    default_of,
    field_names,
    fields_of,
    flag,
    is_required,
    is_union,
    to_yaml,
    types_in,
)
from raydet.config.help import help_page

Config = TypeVar("Config")

_SYNONYMS = {
    "learning_rate": ("lr", "lr0"),
    "image_size": ("imgsz", "img_size", "imgsize", "size", "resolution", "input_size"),
    "batch_size": ("batch", "bs"),
    "score_threshold": ("conf", "confidence", "threshold", "conf_threshold", "min_score"),
    "checkpoint": ("weights", "ckpt", "model_path"),
    "model": ("weights", "checkpoint", "pretrained"),
    "data": ("source", "input", "dataset", "images", "image", "file", "path"),
    "train_data": ("data", "dataset", "train"),
    "images": ("source", "input", "data"),
    "out": ("output", "output_dir", "output_folder", "save_dir", "project", "dest"),
    "use_gpu": ("device", "gpu", "gpus", "cuda"),
    "num_workers": ("workers", "gpus", "num_gpus", "nproc"),
    "epochs": ("num_epochs", "max_epochs", "num_train_epochs"),
    "predict": ("detect", "infer", "inference", "score"),
    "evaluate": ("eval", "val", "validate", "test"),
    "tune": ("search", "sweep"),
    "prepare": ("convert", "import"),
}
"""Names by which other programs call an option or a command."""
_TYPES = {"int": "an integer", "float": "a number", "bool": "true or false", "str": "text", "list": "a list"}


def load(
    config_class: type[Config],
    arguments: Sequence[str],
    *,
    program: str = "raydet",
    example: str = "",
    to_text: Callable[[Config], str] = to_yaml,
    output_class: type | None = None,
) -> Config:
    """Make a config from command-line options.

    `--config FILE` may appear anywhere among them; options override the file. An option may be written with `-` or
    `_`. A switch needs no value and takes the prefix `no-`; a list of words or numbers is written `a,b`. An option with
    the value NAME=VALUE takes several of them and may be repeated. A path, or a list of paths, is written `a b`, as a
    shell expands `*`, and may be repeated.

    Args:
        config_class: The command's config.
        arguments: The command line after the command's name.
        program: The command as typed, for help and messages.
        example: Options of a command line that works, for the help.
        to_text: Formats the config for `--print-config`.
        output_class: Class with the options about the output, for the help.

    Raises:
        UserError: An option is unknown, invalid or missing, or a file cannot be read.
        SystemExit: After `--help` or `--print-config`, with code 0.
    """
    tokens, config_files, print_config = _normalise(config_class, arguments)
    if tokens and tokens[0] in ("-h", "--help"):
        write_out(help_page(config_class, program=program, example=example, output_class=output_class))
        raise SystemExit(0)
    values: dict[str, Any] = {}
    for path in config_files:
        values.update(_read_yaml(config_class, path))
    config = _parse(config_class, values, tokens, program)
    if print_config:
        write_out(to_text(config))
        raise SystemExit(0)
    return config


def _parse(config_class: type[Config], values: dict[str, Any], tokens: Sequence[str], program: str) -> Config:
    import jsonargparse

    parser = jsonargparse.ArgumentParser(prog=program, exit_on_error=False)
    hints = typing.get_type_hints(config_class)
    required = []
    for item in fields_of(config_class):
        if is_required(item):
            required.append(item.name)
            parser.add_argument(f"--{item.name}", type=hints[item.name])
        else:
            parser.add_argument(f"--{item.name}", type=hints[item.name], default=default_of(item))
    try:
        parsed = parser.parse_object(values, defaults=True)
        parsed = parser.parse_args(list(tokens), namespace=parsed)
    except (jsonargparse.ArgumentError, TypeError, ValueError) as error:
        raise UserError(_wrong_value(str(error))) from None
    missing = [flag(name) for name in required if parsed[name] is None]
    if missing:
        raise UserError(f"missing {', '.join(missing)}; see {program} --help")
    return config_class(**{name: parsed[name] for name in field_names(config_class)})


def _wrong_value(message: str) -> str:
    """Return jsonargparse's message in one line, without the spelling of Python's types."""
    line = one_line(message)
    union = re.match(
        r'Parser key "?(\w+)"?: Does not validate .*?Errors: (.*) Given value type: .*? Given value: (.*)', line
    )
    if union:
        name, errors, value = union.groups()
        choices = re.findall(r"typing\.Literal\[(.*?)\]", errors)
        kinds = [f"one of {choices[0].replace(chr(39), '')}"] if choices else []
        named = re.findall(r"Expected a <class '(\w+)'>", errors)
        kinds += [_TYPES.get(kind, f"a {kind}") for kind in named if kind != "NoneType"]
        return f"{flag(name)} must be {' or '.join(kinds)}; got {value}"
    match = re.match(
        r'(?:Parser key|Problem with) "?(\w+)"?: (?:Expected a|.*?Expected a) (.*?)\. Got value: (.*)', line
    )
    if not match:
        return line
    name, expected, value = match.groups()
    expected = re.sub(r"<class '(\w+)'>", r"\1", expected)
    only = re.match(r"typing\.Literal\[(.*)\]", expected)
    if only:
        return f"{flag(name)} must be one of {only.group(1).replace(chr(39), '')}; got {value}"
    return f"{flag(name)} must be {_TYPES.get(expected, f'of type {expected}')}; got {value}"


def load_file(config_class: type[Config], path: str, **overrides: Any) -> Config:
    """Make a config from a YAML file, with some fields set by the caller."""
    given = {name: value for name, value in overrides.items() if value is not None}
    return _parse(config_class, {**_read_yaml(config_class, path), **given}, [], "raydet")


def build(
    config_class: type[Config], values: Mapping[str, Any], *, program: str, where: str = "", file: str | None = None
) -> Config:
    """Make a config from plain values, such as those nested in another config.

    Args:
        config_class: The config to make.
        values: Values by option name; strings are parsed as in a YAML file.
        program: The command whose `--help` messages refer to.
        where: A description of the values, for the message about an unknown one.
        file: YAML file with further values; `values` override it.

    Raises:
        UserError: An option is unknown, invalid or missing, or a file cannot be read.
    """
    for name in values:
        if name not in field_names(config_class):
            raise UserError(f"unknown key `{name}` in {where}{_suggestion(str(name), config_class)}")
    given = {} if file is None else _read_yaml(config_class, file)
    return _parse(config_class, {**given, **values}, [], program)


def _normalise(config_class: type, arguments: Sequence[str]) -> tuple[list[str], list[str], bool]:
    """Spell options with `_`, add values to switches, write lists as JSON; remove `--config` and `--print-config`."""
    hints = typing.get_type_hints(config_class)
    switches = {name for name, hint in hints.items() if hint is bool or _is_optional_bool(hint)}
    elements = {name: element for name, hint in hints.items() if (element := _list_element(hint)) is not None}
    mixed = {name for name in elements if int in typing.get_args(hints[name])}  # a number, or a list of them
    # A path, which may contain commas, or a list of them.
    places = {name for name in elements if is_union(hints[name]) and str in typing.get_args(hints[name])}
    pairs: dict[str, dict[str, Any]] = {
        item.name: {} for item in fields_of(config_class) if item.metadata["value"] == PAIRS
    }
    places_given: dict[str, list[str]] = {}
    result: list[str] = []
    files: list[str] = []
    print_config = False
    rest = list(arguments)
    while rest:
        token = rest.pop(0)
        if token == "-h":
            return ["--help"], [], False
        if not token.startswith("--"):
            raise UserError(f"unexpected `{token}`; options are written --name value")
        key, equals, value = token[2:].partition("=")
        name = key.replace("-", "_")
        if name == "print_config":
            print_config = True
        elif name == "config":
            if not equals and not rest:
                raise UserError("--config needs a file")
            files.append(value if equals else rest.pop(0))
        elif name.removeprefix("no_") in switches and name not in switches and not equals:
            result.append(f"--{name.removeprefix('no_')}=false")
        elif name in switches and not equals and (not rest or rest[0].startswith("--")):
            result.append(f"--{name}=true")
        elif name == "help":
            return ["--help"], [], False
        elif name not in hints:
            raise UserError(f"unknown option --{key}{_suggestion(name, config_class, '--')}")
        elif not equals:
            if not rest:
                raise UserError(f"--{key} needs a value")
            rest.insert(0, f"--{name}={rest.pop(0)}")
        elif name in pairs and not value.startswith("{") and value != "null":
            pairs[name] |= _pair(key, value)
            if rest and not rest[0].startswith("--"):
                rest.insert(0, f"--{name}={rest.pop(0)}")
        elif name in places:
            several = places_given.setdefault(name, [])
            several.append(value)
            while rest and not rest[0].startswith("--"):
                several.append(rest.pop(0))
        elif name in elements and not value.startswith("[") and value != "null" and ("," in value or name not in mixed):
            words = [word.strip() for word in value.split(",")]
            is_number = elements[name] in (int, float)
            written = f"[{value}]" if is_number else json.dumps(words, ensure_ascii=False)
            result.append(f"--{name}={written}")
        else:
            result.append(f"--{name}{equals}{value}")
    for name, several in places_given.items():
        result.append(f"--{name}={json.dumps(several, ensure_ascii=False) if len(several) > 1 else several[0]}")
    result += [f"--{name}={json.dumps(mapping)}" for name, mapping in pairs.items() if mapping]
    return result, files, print_config


def _pair(key: str, word: str) -> dict[str, Any]:
    """Parse `name=value`; a value that is JSON, such as a number, is read as such."""
    name, equals, value = word.partition("=")
    if not name or not equals:
        raise UserError(f"--{key} must be written as {PAIRS}, got {word}")
    try:
        return {name.replace("-", "_"): json.loads(value)}
    except ValueError:
        return {name.replace("-", "_"): value}


def _is_optional_bool(hint: Any) -> bool:
    return isinstance(hint, types.UnionType) and bool in typing.get_args(hint)


def _list_element(hint: Any) -> Any:
    """Return the element type of a list of words or numbers, or of a union with one; None for any other type."""
    element = next((typing.get_args(member)[0] for member in types_in(hint) if typing.get_origin(member) is list), None)
    return element if element in (str, int, float) or typing.get_origin(element) is Literal else None


def _read_yaml(config_class: type, path: str) -> dict[str, Any]:
    from raydet.tables import storage

    content = storage.read_given_yaml(path, "config file")
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold `option: value` lines, found a {type(content).__name__}")
    for name in content:
        if name not in field_names(config_class):
            raise UserError(f"unknown key `{name}` in {path}{_suggestion(str(name), config_class)}")
    return content


def closest(name: str, known: Sequence[str]) -> str | None:
    """Return the known name that a misspelt or shortened one probably means, or None."""
    synonyms = [own for own in known if name in _SYNONYMS.get(own, ())]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    # A shortened name, such as `draw-thresh`.
    parts = re.split(r"[_\W]", name)
    shortened = [own for own in known if all(any(word.startswith(part) for word in own.split("_")) for part in parts)]
    far = difflib.get_close_matches(name, known, n=1)
    return next(iter([*synonyms, *near, *sorted(shortened, key=len), *far]), None)


def _suggestion(name: str, config_class: type, prefix: str = "") -> str:
    close = closest(name.removeprefix("no_"), field_names(config_class))
    if close is None:
        return "; --help lists the options"
    return f"; did you mean {flag(close) if prefix else close}?"

"""A config of a YAML file and options on the command line, or one clear line that says what is wrong with them."""

import difflib
import json
import re
import textwrap
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

import yaml

from raydet.common.errors import UserError, one_line
from raydet.config import default_of, field_names, fields_of, is_required, to_yaml

Config = TypeVar("Config")


def load(config_class: type[Config], arguments: Sequence[str], *, program: str = "raydet") -> Config:
    """Makes a config of command-line options.

    `--config FILE` may stand among them; options override the file wherever they stand. Options may be written with
    `-` or `_`; one that is true or false may be given without a value, or with `no-` before it.

    Raises:
        UserError: An unknown option, a wrong value, a missing one, a file that cannot be read.
        SystemExit: After `--help` or `--print-config`, with code 0.
    """
    tokens, config_files, print_config = _normalise(config_class, arguments)
    if tokens and tokens[0] in ("-h", "--help"):
        print(_help(config_class, program))
        raise SystemExit(0)
    values: dict[str, Any] = {}
    for path in config_files:
        values.update(_read_yaml(config_class, path))
    config = _parse(config_class, values, tokens, program)
    if print_config:
        print(to_yaml(config), end="")
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
    missing = [f"--{name.replace('_', '-')}" for name in required if parsed[name] is None]
    if missing:
        raise UserError(f"missing {', '.join(missing)}; see {program} --help")
    return config_class(**{name: parsed[name] for name in field_names(config_class)})


def _wrong_value(message: str) -> str:
    """jsonargparse's message in one line, without the spelling of Python's types."""
    line = one_line(message)
    union = re.match(
        r'Parser key "?(\w+)"?: Does not validate .*?Errors: (.*) Given value type: .*? Given value: (.*)', line
    )
    if union:
        name, errors, value = union.groups()
        choices = re.findall(r"typing\.Literal\[(.*?)\]", errors)
        kinds = [f"one of {choices[0].replace(chr(39), '')}"] if choices else []
        kinds += [
            {"int": "a number", "list": "a list"}.get(kind, f"a {kind}")
            for kind in re.findall(r"Expected a <class '(\w+)'>", errors)
        ]
        return f"{name} must be {' or '.join(kinds)}; got {value}"
    match = re.match(
        r'(?:Parser key|Problem with) "?(\w+)"?: (?:Expected a|.*?Expected a) (.*?)\. Got value: (.*)', line
    )
    if not match:
        return line
    name, expected, value = match.groups()
    expected = re.sub(r"<class '(\w+)'>", r"\1", expected)
    only = re.match(r"typing\.Literal\[(.*)\]", expected)
    if only:
        return f"{name} must be one of {only.group(1).replace(chr(39), '')}; got {value}"
    return f"{name} must be of type {expected}; got {value}"


def _help(config_class: type, program: str) -> str:
    """The options of a command, one each, with what they are by default."""
    hints = typing.get_type_hints(config_class)
    lines = [f"usage: {program} [--config FILE.yaml] [options]", "", config_class.__doc__ or "", ""]
    for item in fields_of(config_class):
        option = f"--{item.name.replace('_', '-')}"
        hint = hints[item.name]
        choices = f" ({' | '.join(typing.get_args(hint))})" if typing.get_origin(hint) is Literal else ""
        if is_required(item):
            default = "required"
        else:
            default = (
                "" if default_of(item) in (None, []) else f"default: {yaml.safe_dump(default_of(item)).splitlines()[0]}"
            )
        lines.append(f"  {option}{choices}")
        text = f"{item.metadata['help']} [{default}]" if default else item.metadata["help"]
        lines += textwrap.wrap(text, width=100, initial_indent=" " * 8, subsequent_indent=" " * 8)
    lines += [
        "",
        "  --config FILE",
        "        YAML file with any of these options; options on the command line override it",
    ]
    lines += ["  --print-config", "        print the whole resulting config as YAML and stop"]
    return "\n".join(lines)


def load_file(config_class: type[Config], path: str, **overrides: Any) -> Config:
    """Makes a config of a YAML file, with some fields set by the caller."""
    given = {name: value for name, value in overrides.items() if value is not None}
    return _parse(config_class, {**_read_yaml(config_class, path), **given}, [], "raydet")


def build(
    config_class: type[Config], values: Mapping[str, Any], *, program: str, where: str = "", file: str | None = None
) -> Config:
    """Makes a config of plain values, such as those that stand within another config.

    Args:
        config_class: Of which kind.
        values: By option; texts are read as in a YAML file.
        program: Whose `--help` tells more.
        where: What the values are, for the message about an unknown one.
        file: YAML file with further values, which these override.

    Raises:
        UserError: An unknown option, a wrong value, a missing one, a file that cannot be read.
    """
    for name in values:
        if name not in field_names(config_class):
            raise UserError(f"unknown key `{name}` in {where}{_suggestion(str(name), config_class)}")
    given = {} if file is None else _read_yaml(config_class, file)
    return _parse(config_class, {**given, **values}, [], program)


def _normalise(config_class: type, arguments: Sequence[str]) -> tuple[list[str], list[str], bool]:
    """Writes options with `_`, gives lone switches their value, and takes out `--config` and `--print-config`."""
    hints = typing.get_type_hints(config_class)
    switches = {name for name, hint in hints.items() if hint is bool or _is_optional_bool(hint)}
    word_lists = {name for name, hint in hints.items() if hint == list[str] or hint == list[str] | None}
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
        elif not equals and name in hints:
            if not rest:
                raise UserError(f"--{key} needs a value")
            rest.insert(0, f"--{name}={rest.pop(0)}")
        elif name in word_lists and not value.startswith("["):
            words = [word.strip() for word in value.split(",")]
            result.append(f"--{name}={json.dumps(words, ensure_ascii=False)}")
        else:
            result.append(f"--{name}{equals}{value}")
    return result, files, print_config


def _is_optional_bool(hint: Any) -> bool:
    return isinstance(hint, types.UnionType) and bool in typing.get_args(hint)


def _read_yaml(config_class: type, path: str) -> dict[str, Any]:
    from raydet.tables import storage

    try:
        content = yaml.safe_load(storage.read_bytes(path))
    except FileNotFoundError:
        raise UserError(f"no such config file: {path}") from None
    except (yaml.YAMLError, OSError) as error:
        raise UserError(f"cannot read the config file {path}: {one_line(error)}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold `option: value` lines, found a {type(content).__name__}")
    for name in content:
        if name not in field_names(config_class):
            raise UserError(f"unknown key `{name}` in {path}{_suggestion(str(name), config_class)}")
    return content


def _suggestion(name: str, config_class: type, prefix: str = "") -> str:
    close = difflib.get_close_matches(name, field_names(config_class), n=1)
    if not close:
        return "; see --help for those there are"
    suggested = close[0].replace("_", "-") if prefix else close[0]
    return f"; did you mean {prefix}{suggested}?"

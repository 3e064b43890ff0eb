"""The help page of a command: required options first, then the others by group, and an example at the end."""

import textwrap
import typing
from typing import Any, Literal

import yaml

from raydet.config.fields import GROUPS, default_of, fields_of, flag, is_required, types_in

_VALUES = {int: "N", float: "X"}


def help_page(config_class: type, *, program: str, example: str = "", output_class: type | None = None) -> str:
    """Lay out the options of a command.

    Args:
        config_class: The command's config.
        program: The command as typed, such as `raydet train`.
        example: Options of a command line that works.
        output_class: Class with the options about the output, if the command has them.
    """
    # A command's own options stand before those that it shares with others.
    fields = sorted(fields_of(config_class), key=lambda item: item.name not in config_class.__annotations__)
    hints = typing.get_type_hints(config_class)
    required = sorted((item for item in fields if is_required(item)), key=lambda item: item.name == "out")
    usage = [_spelling(item, hints[item.name]) for item in required]
    lines = [_wrapped(" ".join([f"usage: {program}", *usage, "[options]"]), 0, 7), "", config_class.__doc__ or ""]
    if required:
        lines += ["", "Required:", *[_entry(item, hints[item.name]) for item in required]]
    groups = [group for group in GROUPS if any(item.metadata["group"] == group for item in fields)]
    for group in groups:
        entries = [
            _entry(item, hints[item.name])
            for item in fields
            if item.metadata["group"] == group and not is_required(item)
        ]
        if group == GROUPS[0]:
            entries += [
                "  --config FILE\n        YAML file with any of these options; the command line overrides it",
                "  --print-config\n        print the resulting config as YAML and exit",
            ]
        lines += ["", "Options:" if len(groups) == 1 else f"{group}:", *entries]
    if output_class is not None:
        lines += ["", "Output:", *[_entry(item, bool) for item in fields_of(output_class)]]
    if example:
        lines += ["", "Example:", f"  {program} {example}"]
    return "\n".join(lines) + "\n"


def _entry(item: Any, hint: Any) -> str:
    default = None if is_required(item) else default_of(item)
    text = item.metadata["help"]
    if default is not None and default is not False and default not in ([], ""):
        shown = "on" if default is True else yaml.safe_dump(default).splitlines()[0]
        text += f" (default: {shown})"
    return f"{_wrapped(_spelling(item, hint), 2, 10)}\n{_wrapped(text, 8, 8)}"


def _spelling(item: Any, hint: Any) -> str:
    """Return an option with the form of its value; a switch with its opposite, unless it is off by default."""
    if bool in types_in(hint):
        return flag(item.name) if default_of(item) is False else f"{flag(item.name)} | {flag('no_' + item.name)}"
    return f"{flag(item.name)} {item.metadata['value'] or _value(item.name, hint)}"


def _wrapped(text: str, first: int, further: int) -> str:
    return textwrap.fill(
        text,
        width=100,
        initial_indent=" " * first,
        subsequent_indent=" " * further,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _value(name: str, hint: Any) -> str:
    """Return the form of an option's value: its choices, a number, a list, or the last word of the option's name."""
    forms = []
    for member in types_in(hint):
        origin = typing.get_origin(member)
        if origin is Literal:
            forms += [str(choice) for choice in typing.get_args(member)]
        elif member in _VALUES:
            forms.append(_VALUES[member])
        elif origin is list:
            (element,) = typing.get_args(member)
            form = {int: "N,N,...", float: "X,X,...", str: "A,B,..."}.get(element, "[...]")
            forms.append(",".join(typing.get_args(element)) if typing.get_origin(element) is Literal else form)
        elif origin is dict:
            forms.append("{...}")
        elif member is str:
            forms.append(name.rsplit("_", 1)[-1].upper())
    return " | ".join(forms)

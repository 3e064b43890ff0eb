"""Command lines from documents and job files, parsed by raydet's own parser."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from raydet.cli.commands import COMMANDS
from raydet.cli.usage import GROUPS
from raydet.config.options import load
from raydet.config.output import split_output_options

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)


def config_of(words: Sequence[str]) -> Any:
    """Return the config of `raydet WORDS`.

    Raises:
        UserError: An option does not exist or has an invalid value.
    """
    _, (name, *options) = split_output_options(words)
    if name in GROUPS:
        name = f"{name} {options.pop(0)}"
    assert name in COMMANDS, f"no command `{name}`"
    return load(COMMANDS[name].config, options, program=f"raydet {name}")


def blocks_of(path: Path, *languages: str) -> Iterator[str]:
    """Yield the contents of a document's code blocks in one of the languages; "" means no language."""
    for language, content in _BLOCK.findall(path.read_text(encoding="utf-8")):
        if language in languages:
            yield content


def commands_of(script: str) -> list[str]:
    """Return the commands of a shell script, with continued lines joined and comments removed."""
    lines = script.replace("\\\n", " ").splitlines()
    return [line for line in (re.sub(r"(^|\s)#.*", "", line).strip() for line in lines) if line]

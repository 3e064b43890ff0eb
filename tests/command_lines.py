"""Command lines as documents and job files give them → what raydet's own parser makes of them."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from raydet.cli.commands import COMMANDS
from raydet.config.options import load

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
_TWO_WORDS = ("prepare", "export")


def config_of(words: Sequence[str]) -> Any:
    """The config of `raydet WORDS`.

    Raises:
        UserError: There is no such command or option, or a value is not what it should be.
    """
    name, *options = words
    if name in _TWO_WORDS:
        name = f"{name} {options.pop(0)}"
    assert name in COMMANDS, f"no command `{name}`"
    return load(COMMANDS[name].config, options, program=f"raydet {name}")


def blocks_of(path: Path, *languages: str) -> Iterator[str]:
    """The contents of a document's code blocks in one of the languages; "" stands for none."""
    for language, content in _BLOCK.findall(path.read_text(encoding="utf-8")):
        if language in languages:
            yield content


def commands_of(script: str) -> list[str]:
    """The commands of a shell script, one each, with continued lines joined and comments left out."""
    lines = script.replace("\\\n", " ").splitlines()
    return [line for line in (re.sub(r"(^|\s)#.*", "", line).strip() for line in lines) if line]

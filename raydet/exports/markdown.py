"""Markdown of the cards on the Hugging Face Hub: tables, code blocks, and text from files as plain text."""

import re
from collections.abc import Sequence

from raydet.common.errors import one_line


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table; cells are markdown already."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def fenced(text: str, language: str) -> str:
    """Return a block of code."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def escaped(text: str) -> str:
    """Escape text for one line of markdown."""
    return re.sub(r"([\\`*_\[\]<>#|~&!$])", r"\\\1", one_line(text))

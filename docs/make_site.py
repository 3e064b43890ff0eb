"""Write the site's pages to build/docs: the project's own, its notebooks, and a reference from the code."""

import base64
import inspect
import json
import posixpath
import re
import shutil
from pathlib import Path
from typing import Any

import raydet
from raydet.cli.commands import COMMANDS
from raydet.config.help import help_page

PROJECT = Path(__file__).parents[1]
PAGES = PROJECT / "build" / "docs"
TOP = ("README.md", "SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md")
_LINK = re.compile(r"\[([^\]\n]*(?:\n[^\]\n]+)?)\]\(([^)\s]+)\)")


def main() -> None:
    """Write all pages anew."""
    shutil.rmtree(PAGES, ignore_errors=True)
    shutil.copytree(PROJECT / "docs" / "images", PAGES / "images")
    for source in [*(PROJECT / name for name in TOP), *sorted((PROJECT / "docs").glob("*.md"))]:
        name = "index.md" if source.name == "README.md" else source.name
        folder = source.parent.relative_to(PROJECT).as_posix()
        (PAGES / name).write_text(with_site_links(source.read_text("utf-8"), folder), "utf-8")
    for source in sorted((PROJECT / "docs" / "tutorials").glob("*.ipynb")):
        notebook = json.loads(source.read_text("utf-8"))
        page = (PAGES / "tutorials" / source.name).with_suffix(".md")
        page.parent.mkdir(exist_ok=True)
        page.write_text(with_site_links(notebook_page(notebook, page), "docs/tutorials"), "utf-8")
    (PAGES / "commands.md").write_text(commands_page(), "utf-8")
    (PAGES / "python.md").write_text(python_page(), "utf-8")


def with_site_links(text: str, folder: str) -> str:
    """Point a page's links to the site's pages; a link to another file of the repository becomes its text.

    Args:
        text: A page in Markdown.
        folder: Its folder in the repository, from which its links start.
    """

    def replaced(match: re.Match[str]) -> str:
        words, target = match.groups()
        if "://" in target or target.startswith("#"):
            return match[0]
        path, sign, anchor = target.partition("#")
        place = _place_in_site(posixpath.normpath(posixpath.join(folder, path)))
        here = folder.removeprefix("docs").strip("/") or "."
        return words if place is None else f"[{words}]({posixpath.relpath(place, here)}{sign}{anchor})"

    return _LINK.sub(replaced, text)


def _place_in_site(path: str) -> str | None:
    """Return the place of one of the repository's files in the site; None for a file that is not part of it."""
    if path in TOP:
        return "index.md" if path == "README.md" else path
    return path.removeprefix("docs/").replace(".ipynb", ".md") if path.startswith("docs/") else None


def notebook_page(notebook: dict[str, Any], page: Path) -> str:
    """Return a notebook's cells and outputs as Markdown; its pictures are written beside the page."""
    parts = []
    for number, cell in enumerate(notebook["cells"]):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts += [source, ""]
            continue
        parts += ["```python", source, "```", ""]
        shown = [output for output in cell["outputs"] if output.get("name") != "stderr"]
        text = "".join("".join(output["text"]) for output in shown if output["output_type"] == "stream")
        parts += ["```text", text.rstrip(), "```", ""] if text else []
        for output in shown:
            data = output.get("data", {})
            if "image/png" in data:
                picture = page.with_name(f"{page.stem}-{number}.png")
                picture.write_bytes(base64.b64decode(data["image/png"]))
                parts += [f"![Output of the cell above]({picture.name})", ""]
            elif "text/html" in data:
                parts += ['<div class="output" style="overflow-x: auto">', "".join(data["text/html"]), "</div>", ""]
            elif "application/vnd.plotly.v1+json" not in data and data:
                parts += ["```text", "".join(data["text/plain"]).rstrip(), "```", ""]
    return "\n".join(parts)


def commands_page() -> str:
    """Return a page with the help of every command."""
    parts = ["# Commands", "", "The text of `raydet COMMAND --help` for every command.", ""]
    for command in COMMANDS.values():
        page = help_page(command.config, program=f"raydet {command.name}", example=command.example)
        parts += [f"## raydet {command.name}", "", "```text", page.rstrip(), "```", ""]
    return "\n".join(parts)


def python_page() -> str:
    """Return a page with the public functions, and the classes of their results."""
    parts = ["# Python", "", "Everything here is imported from `raydet`. Functions of commands take one config, whose"]
    parts += ["fields are the options of the [command](commands.md), with `_` for `-`.", ""]
    parts += ["## In memory", "", *_entries(raydet.load, raydet.CocoAP)]
    module = "raydet.engines.in_memory"
    parts += [f"::: {module}.loaded.LoadedModel", "", f"::: {module}.picture_detections.PictureDetections", ""]
    parts += ["## Errors", "", *_entries(raydet.UserError), "## Commands", ""]
    seen: set[type] = set()
    for command in COMMANDS.values():
        function = getattr(raydet, command.function)
        parts += _entries(function)
        result = inspect.get_annotations(function)["return"]
        if isinstance(result, type) and result not in seen:
            seen.add(result)
            parts += _entries(result)
    return "\n".join(parts)


def _entries(*items: Any) -> list[str]:
    return [line for item in items for line in (f"::: {item.__module__}.{item.__qualname__}", "")]


if __name__ == "__main__":
    main()

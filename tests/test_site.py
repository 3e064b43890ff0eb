"""The documentation site: every page is in its menu, its links lead to pages, and the code's reference is complete."""

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from docs import make_site
from raydet.cli.commands import COMMANDS

PROJECT = Path(__file__).parents[1]
TUTORIALS = sorted((PROJECT / "docs" / "tutorials").glob("*.ipynb"))


def pages_in(menu: Any) -> list[str]:
    if isinstance(menu, str):
        return [menu]
    entries = menu.values() if isinstance(menu, dict) else menu
    return [page for entry in entries for page in pages_in(entry)]


def test_the_menu_has_every_page_once() -> None:
    menu = pages_in(tomllib.loads((PROJECT / "zensical.toml").read_text())["project"]["nav"])
    written = {path.name for path in (PROJECT / "docs").glob("*.md")}
    written |= {f"tutorials/{path.stem}.md" for path in TUTORIALS}
    assert sorted(menu) == sorted(
        written | {"index.md", "commands.md", "python.md", "SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md"}
    )


@pytest.mark.parametrize(
    ("folder", "text", "expected"),
    [
        (".", "[Data](docs/data.md#csv)", "[Data](data.md#csv)"),
        (".", "![A report](docs/images/report.png)", "![A report](images/report.png)"),
        (".", "see [the licence](LICENSE).", "see the licence."),
        ("docs", "[limits](../SECURITY.md)", "[limits](SECURITY.md)"),
        ("docs", "[first\nsteps](../README.md)", "[first\nsteps](index.md)"),
        ("docs", "[first](tutorials/ten_minutes.ipynb)", "[first](tutorials/ten_minutes.md)"),
        ("docs/tutorials", "[recipe](../fine_tuning.md), ![](a.png)", "[recipe](../fine_tuning.md), ![](a.png)"),
        ("docs", "[below](#there), [Ray](https://www.ray.io)", "[below](#there), [Ray](https://www.ray.io)"),
        ("docs", "[`table_checks.py`](../benchmarks/table_checks.py)", "`table_checks.py`"),
    ],
)
def test_links_lead_to_pages_of_the_site(folder: str, text: str, expected: str) -> None:
    assert make_site.with_site_links(text, folder) == expected


def test_the_reference_of_commands_has_all_of_them() -> None:
    page = make_site.commands_page()
    assert all(f"## raydet {name}\n" in page for name in COMMANDS)
    assert "--score-threshold" in page


def test_a_notebook_becomes_a_page(tmp_path: Path) -> None:
    outputs = [
        {"output_type": "stream", "name": "stderr", "text": "a warning"},
        {"output_type": "stream", "name": "stdout", "text": ["3 "]},
        {"output_type": "stream", "name": "stdout", "text": ["images\n"]},
        {"output_type": "display_data", "data": {"image/png": "aGVsbG8=", "text/plain": "a picture"}},
        {
            "output_type": "execute_result",
            "data": {"text/html": ["<table></table>"], "text/plain": "1"},
        },
    ]
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "Text."]},
        {"cell_type": "code", "source": "import raydet", "outputs": outputs},
    ]
    page = make_site.notebook_page({"cells": cells}, tmp_path / "first.md")
    assert page.startswith("# Title\nText.\n\n```python\nimport raydet\n```\n\n```text\n3 images\n```\n")
    assert (
        "warning" not in page
        and "![Output of the cell above](first-1.png)" in page
        and (tmp_path / "first-1.png").read_bytes() == b"hello"
    )
    assert page.rstrip().endswith("<table></table>\n</div>")


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_runs(path: Path, tmp_path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    assert all(cell.get("outputs") is not None for cell in notebook.cells if cell.cell_type == "code")
    NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": str(tmp_path)}}).execute()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    for name in ("zensical.toml", *make_site.TOP):
        shutil.copy(PROJECT / name, tmp_path)
    shutil.copytree(PROJECT / "docs", tmp_path / "docs")
    (tmp_path / "raydet").symlink_to(PROJECT / "raydet")
    subprocess.run([sys.executable, "docs/make_site.py"], cwd=tmp_path, check=True)
    zensical = Path(sys.executable).parent / "zensical"
    built = subprocess.run([zensical, "build", "--strict"], cwd=tmp_path, text=True, capture_output=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    page = (tmp_path / "build" / "site" / "python.html").read_text()
    names = [command.function for command in COMMANDS.values()]
    assert all(f'.{name}"' in page for name in [*names, "CocoAP", "load"])
    assert len(names) > 20

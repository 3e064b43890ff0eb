"""The output of `--json`, held against docs/json_output.md."""

import json
import re
from pathlib import Path
from typing import Any

from raydet.common.display.json_form import SCHEMA_VERSION, json_line, json_value

PAGE = Path(__file__).parents[1] / "docs" / "json_output.md"
_HEADER = ["type", "schema_version", "command"]


def documented(heading: str) -> list[str]:
    """Return the fields in the tables below a heading of the page that names a command or another subject."""
    sections = re.split(r"^##+ ", PAGE.read_text("utf-8"), flags=re.M)
    names = (f"`{heading}`", heading)
    (section,) = [text for text in sections if any(name in text.partition("\n")[0].split(", ") for name in names)]
    return re.findall(r"^\| `(\w+)` \|", section, re.M)


def check_result(result: Any, command: str) -> dict[str, Any]:
    """Check that a result has the documented fields, and return it as a reader of the JSON gets it."""
    values: dict[str, Any] = _parsed(json_line(json_value(result)))
    assert [*values] == documented(command)
    return values


def parse_output(text: str, command: str | None, *, exit_code: int = 0) -> list[dict[str, Any]]:
    """Parse the output of a command with `--json`, check every object, and return them."""
    objects: list[dict[str, Any]] = [_parsed(line) for line in text.splitlines()]
    *earlier, last = objects
    for item in objects:
        assert [*item][:3] == _HEADER
        assert (item["schema_version"], item["command"]) == (SCHEMA_VERSION, command)
    for item in earlier:
        assert item["type"] in ("message", "progress", "epoch", "trial", "round")
        if item["type"] in ("message", "progress"):
            assert set(item) <= set(documented("Objects"))
    assert last["exit_code"] == exit_code
    if last["type"] == "error":
        assert [*last] == [*_HEADER, "exit_code", "message"]
    else:
        assert last["type"] == "result" and command is not None
        assert [*last] == [*_HEADER, "exit_code", *documented(command)]
    return objects


def _parsed(line: str) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(line, parse_constant=refuse)

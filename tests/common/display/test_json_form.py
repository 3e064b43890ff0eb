"""Results as JSON."""

import dataclasses
import json
import math
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from raydet.common.display.json_form import json_fields, json_line, json_value
from raydet.config import PredictConfig


@dataclasses.dataclass(frozen=True)
class _Result:
    out: str
    numbers: tuple[float | None, ...]
    large: list[int] = dataclasses.field(default_factory=list, repr=False)

    json_properties: ClassVar = ("page",)

    @property
    def page(self) -> Path:
        return Path(self.out, "page.html")


def test_a_result_has_its_fields_and_the_properties_it_names() -> None:
    assert json_fields(_Result) == ("out", "numbers", "page")
    result = _Result("runs/a", (0.5, None, math.nan, -math.inf), [1] * 1000)
    assert json_value(result) == {"out": "runs/a", "numbers": [0.5, None, None, None], "page": "runs/a/page.html"}


def test_arrays_mappings_and_objects_with_a_form_of_their_own() -> None:
    class Own:
        def to_json(self) -> dict[str, object]:
            return {"value": np.float32(0.5), "path": Path("a/b")}

    given = {1: np.array([[1.0, np.nan]]), "own": Own(), "flag": np.True_, "names": ("a", "b"), "set": {3}}
    expected = {"1": [[1.0, None]], "own": {"value": 0.5, "path": "a/b"}, "flag": True, "names": ["a", "b"], "set": [3]}
    assert json_value(given) == expected
    with pytest.raises(TypeError, match="object has no form"):
        json_value(object())


def test_a_line_is_ascii_without_secrets() -> None:
    config = PredictConfig(checkpoint="c", data="s3://user:pass-word@host/data", out="\x1b[2J é\nz")
    line = json_line({"config": config})
    assert line.isascii() and line.count("\n") == 1 and line.endswith("\n")
    assert "pass-word" not in line and "\x1b" not in line
    assert json.loads(line)["config"]["out"] == "\x1b[2J é\nz"

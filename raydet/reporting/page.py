"""Report content → HTML, with embedded styles, scripts and chart library."""

import base64
import gzip
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from raydet.reporting.answered import AnswerTable
from raydet.reporting.figures import class_rows, error_rows, headline, number, point_rows, slice_rows, title_of
from raydet.reporting.galleries import Galleries
from raydet.reporting.judging import score_threshold
from raydet.reporting.run_tables import RunTables

_FOLDER = "assets"


def render(run: RunTables, charts: Mapping[str, Any], galleries: Galleries, answers: Sequence[AnswerTable] = ()) -> str:
    """Render the report; `charts` is the result of `figures.charts`."""
    errors, sums = error_rows(run)
    return fill(
        "page.html",
        "page.js",
        charts,
        run=run,
        title=title_of(run),
        headline=headline(run),
        classes=class_rows(run),
        points=point_rows(run),
        slices=slice_rows(run),
        errors=errors,
        error_sums=sums,
        threshold=score_threshold(run),
        charts=charts,
        galleries=galleries,
        answers=answers,
    )


def fill(template: str, script_name: str, data: Mapping[str, Any], /, **content: Any) -> str:
    """Render one of raydet's page templates.

    The chart library is embedded compressed and unpacked by the page: this takes a quarter of the bytes, and the page
    appears before the library is loaded. The content security policy names every script by its hash, so nothing else
    can run.

    Args:
        template: Template file in `assets`.
        script_name: Script file of the page in `assets`, appended to `base.js`, which all pages share.
        data: Chart data, available to the script as `data`; must be JSON-serialisable.
        content: Template variables; all of them are escaped.
    """
    environment = Environment(
        loader=PackageLoader("raydet.reporting", _FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    script, style = _own_file("base.js") + _own_file(script_name), _own_file("page.css")
    library = resources.files("plotly").joinpath("package_data", "plotly.min.js").read_bytes()
    return environment.get_template(template).render(
        **content,
        charts_json=_json_for_html(data),
        policy=_policy(script.encode(), library),
        style=Markup(style),
        script=Markup(script),
        library=base64.b64encode(gzip.compress(library, mtime=0)).decode(),
    )


def _own_file(name: str) -> str:
    return resources.files("raydet.reporting").joinpath(_FOLDER, name).read_text("utf-8")


def _json_for_html(content: Mapping[str, Any]) -> Markup:
    """Return JSON that is safe inside a script element, with the characters escaped that could end one."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _policy(*scripts: bytes) -> str:
    """Return a content security policy under which only these scripts run and nothing is fetched."""
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'" for text in scripts)
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )

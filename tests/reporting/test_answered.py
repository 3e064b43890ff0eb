"""Answers of crops tables in the report: counts and precision equal a plain loop, and drawn boxes carry them."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from raydet.browsing.codes import OUTCOMES
from raydet.browsing.filters import ImageFilter
from raydet.browsing.index import build_index
from raydet.browsing.queries import Queries
from raydet.browsing.sources import open_sources
from raydet.common.errors import UserError
from raydet.config import BrowseConfig, ReportConfig
from raydet.reporting.answered import read_answered
from raydet.reporting.judging import score_threshold
from raydet.reporting.report import report
from raydet.reporting.run_tables import read_run
from raydet.tables.table import open_table
from tests.browsing.made import EVIL, write_two_runs
from tests.crops_tables import Rule, write_crops

COLOURS = ("red", "blue", EVIL)
RULES: dict[str, Rule] = {
    "answer_1": lambda image, place: None if place == 1 else COLOURS[(image // 10 * 3 + place) % 3],
    "depth": lambda image, place: image + place / 10,
}
QUESTION = "What <b>colour</b>?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_two_runs(tmp_path_factory.mktemp("report"), 40)
    write_crops(folder / "crops", str(folder / "a"), RULES, ask=[QUESTION])
    return folder


def test_counts_are_those_of_the_outcomes_in_browse(folder: Path) -> None:
    run = read_run(str(folder / "metrics"), "a")
    table, depths = read_answered(run, [str(folder / "crops")]).tables
    config = BrowseConfig(data=str(folder / "metrics"), run="a", crops=[str(folder / "crops")])
    queries = Queries(build_index(open_sources(config)))
    found: Counter[str] = Counter()
    right: Counter[str] = Counter()
    classes: dict[str, Counter[str]] = {}
    for card in queries.cards(range(40), ImageFilter(), is_single=True):
        for side, category, _, _, outcome, *_, answers, _ in card["boxes"]:
            if side == 1 and OUTCOMES[outcome] in ("correct", "false"):
                text = answers[0] or "no answer"
                found[text] += 1
                right[text] += OUTCOMES[outcome] == "correct"
                classes.setdefault(text, Counter())[queries.index.names[category]] += 1
    assert table.title == QUESTION and table.num_left_out == 0
    rows = {row.text: row for row in table.rows}
    assert {text: row.num_detections for text, row in rows.items()} == found
    assert {text: row.num_correct for text, row in rows.items()} == right
    assert 0 < rows["red"].num_correct < rows["red"].num_detections
    assert rows["red"].precision == right["red"] / found["red"]
    numbers = [row.num_detections for row in table.rows[:-1]]
    assert numbers == sorted(numbers, reverse=True) and table.rows[-1].text == "no answer"
    name, number = classes["red"].most_common(1)[0]
    assert rows["red"].classes.startswith(f"{name} {number}") or list(classes["red"].values()).count(number) > 1
    per_image = open_table(str(folder / "metrics" / "per_image"), "per_image").read().to_pylist()
    own = [row for row in per_image if row["run"] == "a"]
    assert sum(found.values()) == sum(row["true_positives"] + row["false_positives"] for row in own)
    lows = [float(row.text.partition(" to ")[0]) for row in depths.rows]
    assert lows == sorted(lows) and len(lows) == 4


def test_the_page_shows_answers_as_text_and_beside_boxes(folder: Path, tmp_path: Path) -> None:
    crops = [str(folder / "crops")]
    metrics = str(folder / "metrics")
    with_answers = report(ReportConfig(metrics=metrics, run="a", out=str(tmp_path / "with.html"), crops=crops)).out
    page = Path(with_answers).read_text()
    assert "What &lt;b&gt;colour&lt;/b&gt;?" in page and "<b>colour" not in page and EVIL not in page
    threshold = score_threshold(read_run(metrics, "a"))
    texts = re.findall(r"<title>detected: ([^<]*)</title>", page)
    assert len(texts) > 20 and f"from score {threshold:.2f} on" in page
    assert any(re.search(r" · (red|blue) · [0-9]", text) for text in texts)
    assert [text for text in texts if " · " not in text and "?" not in text] == [], "suspect labels have none"
    without = Path(report(ReportConfig(metrics=metrics, run="a", out=str(tmp_path / "without.html"))).out).read_text()
    assert 'id="answers"' not in without and 'id="answers"' in page


@pytest.mark.parametrize(("place", "words"), [("b", "detections"), ("other", "about none of")])
def test_crops_that_do_not_fit_are_one_line(folder: Path, tmp_path: Path, place: str, words: str) -> None:
    crops = str(folder / "b") if place == "b" else write_crops(tmp_path / "crops", str(folder / "b"), RULES)
    options: Any = {"metrics": str(folder / "metrics"), "run": "a", "out": str(tmp_path / "page.html")}
    with pytest.raises(UserError, match=words):
        report(ReportConfig(**options, crops=[crops]))
    assert not (tmp_path / "page.html").exists()

"""The report shows the metrics tables, names missing ones, and runs nothing but its own scripts."""

import base64
import datetime
import hashlib
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from raydet.common.errors import UserError
from raydet.config import EvaluateConfig, ReportConfig
from raydet.measuring import metrics_folder
from raydet.reporting.figures import title_of
from raydet.reporting.galleries import original_href
from raydet.reporting.report import report
from raydet.reporting.run_tables import read_run
from raydet.tables.output_folder import OutputFolder
from raydet.tables.schema import Category, TableKind, build_schema
from raydet.tables.table import TableWriter

Row = dict[str, Any]

EVIL = "</script><script>alert(1)</script>"
NAMES = ["cat", EVIL, "R&D <b>bold</b>"]
CATEGORIES = [Category(number + 1, name) for number, name in enumerate(NAMES)]
TIME = datetime.datetime(2026, 3, 1, 12, 0, tzinfo=datetime.UTC)


def write(folder: Path, kind: TableKind, rows: list[Row]) -> None:
    with TableWriter(str(folder), build_schema(kind, CATEGORIES), config_hash="x") as writer:
        writer.write_rows(rows)


def write_run(out: Path, run: str, tables: dict[TableKind, list[Row]]) -> None:
    """Write a run as `evaluate` does."""
    content = {kind: pa.Table.from_pylist(rows, schema=build_schema(kind, CATEGORIES)) for kind, rows in tables.items()}
    config = EvaluateConfig(truth="truth", detections="detections", run=run)
    metrics_folder.write_run(OutputFolder(str(out), "evaluate"), config, content, extra={})


def metric_rows(run: str, ap: float) -> list[Row]:
    about = {"run": run, "model": f"model of {run}", "split": "val", "area": "all", "max_detections": 100}
    rows: list[Row] = [
        {**about, "metric": "AP", "value": ap, "low": ap - 0.02, "high": ap + 0.03},
        {**about, "metric": "AP50", "iou": 0.5, "value": 0.75},
        {**about, "metric": "APs", "value": None},
        {**about, "metric": "best_f1_threshold", "iou": 0.5, "value": 0.35},
        {**about, "metric": "AP", "slice": "camera=<rear>", "value": 0.222, "low": 0.2, "high": 0.25},
    ]
    for name, value in zip(NAMES, (0.61, 0.32, None), strict=True):
        rows.append({**about, "metric": "AP", "category": name, "value": value})
        rows.append({**about, "metric": "best_f1_threshold", "category": name, "value": 0.4})
    return rows


def box_lists(boxes: list[tuple[list[float], int]]) -> Row:
    return {"bbox": [box for box, _ in boxes], "category": [category for _, category in boxes]}


def picture_bytes() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((100, 200, 3), 90, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_pictures(folder: Path) -> None:
    """Write image 1 with a false positive and a missed object, image 2 with a wrong class, and a broken image 3."""
    truths: dict[int, list[tuple[list[float], int]]] = {
        1: [([10.0, 10.0, 40.0, 40.0], 0), ([120.0, 20.0, 50.0, 60.0], 1)],
        2: [([30.0, 30.0, 60.0, 60.0], 1)],
        3: [([5.0, 5.0, 50.0, 50.0], 0)],
    }
    found: dict[int, list[tuple[list[float], float, int]]] = {
        1: [([10.0, 10.0, 40.0, 40.0], 0.9, 0), ([80.0, 60.0, 30.0, 30.0], 0.8, 0), ([0.0, 0.0, 9.0, 9.0], 0.1, 0)],
        2: [([30.0, 30.0, 60.0, 60.0], 0.7, 0)],
        3: [],
    }
    images, detections = [], []
    for image_id, boxes in truths.items():
        data = b"no picture" if image_id == 3 else picture_bytes()
        path = f'/data/"><img src=x onerror=alert(1)>/{image_id} #1.png'
        place = {"image_id": image_id, "width": 200, "height": 100}
        areas = [box[2] * box[3] for box, _ in boxes]
        objects = {**box_lists(boxes), "id": [1] * len(boxes), "area": areas, "iscrowd": [False] * len(boxes)}
        images.append({**place, "image": {"bytes": data, "path": path}, "objects": objects})
        own = found[image_id]
        lists = {**box_lists([(box, category) for box, _, category in own]), "score": [score for _, score, _ in own]}
        detections.append({**place, "path": path, "detections": lists})
    write(folder / "truth", "images", images)
    write(folder / "detections", "detections", detections)


def write_all(folder: Path) -> Path:
    """Write a metrics folder with two runs, as `evaluate` does."""
    write_pictures(folder)
    out = folder / "metrics"
    new, old = (
        {"run": run, "truth": str(folder / "truth"), "detections": str(folder / "detections"), "time": time}
        | {"num_images": 3, "num_truth": 4, "num_detections": 4, "num_left_out": left_out, "num_unreadable": 1}
        | {"checkpoint_hash": "abc123", "version": "0.1.0", "config": json.dumps({"note": EVIL})}
        for run, time, left_out in (("new", TIME, 2), ("old", TIME - datetime.timedelta(days=1), 0))
    )
    write_run(out, "old", {"runs": [old], "metrics": metric_rows("old", 0.401)})
    tables: dict[TableKind, list[Row]] = {"runs": [new], "metrics": metric_rows("new", 0.512)}
    counts = {1: (1, 1, 1), 2: (0, 1, 1), 3: (0, 0, 1)}
    tables["per_image"] = [
        {"run": "new", "image_id": image_id, "true_positives": right, "false_positives": wrong}
        | {"num_truth": right + missed, "false_negatives": missed, "f1": 0.5 * right}
        for image_id, (right, wrong, missed) in counts.items()
    ]
    tables["pr_curves"] = [
        {"run": "new", "category": name, "iou": iou, "recall": step / 10, "precision": 1 - step / 20, "score": None}
        for name in (None, *NAMES[:2])
        for iou in (0.5, None)
        for step in range(11)
    ]
    kinds = ("class", "location", "both", "duplicate", "background", "missed", "false_positive", "false_negative")
    tables["errors"] = [
        {"run": "new", "category": name, "error": kind, "count": 4, "ap_points": 0.0765}
        for name in (None, *NAMES)
        for kind in kinds
    ]
    cells = [("cat", "cat", 7), ("cat", EVIL, 2), (EVIL, None, 3), (None, "cat", 5)]
    tables["confusion"] = [{"run": "new", "truth": a, "detected": b, "count": n} for a, b, n in cells]
    tables["calibration"] = [
        {"run": "new", "category": name, "low": part / 10, "high": (part + 1) / 10, "count": part % 3}
        | ({"mean_score": part / 10 + 0.05, "precision": part / 10} if part % 3 else {})
        for name in (None, *NAMES)
        for part in range(10)
    ]
    suspect = {"run": "new", "image_id": 2, "kind": "other_class", "category": EVIL, "detected": "cat"}
    tables["suspects"] = [{**suspect, "bbox": [30.0, 30.0, 60.0, 60.0], "score": 0.7, "iou": 1.0}]
    write_run(out, "new", tables)
    return out


class Page(HTMLParser):
    """Parsed page: elements, texts and scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.texts: list[str] = []
        self._in_script = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._in_script = tag == "script"
        if self._in_script:
            self.scripts.append((dict(attrs), ""))

    def handle_endtag(self, tag: str) -> None:
        self._in_script = False

    def handle_data(self, data: str) -> None:
        if self._in_script:
            attributes, text = self.scripts.pop()
            self.scripts.append((attributes, text + data))
        elif data.strip():
            self.texts.append(" ".join(data.split()))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self) -> str:
        return " ".join(self.texts)

    @property
    def charts(self) -> dict[str, Any]:
        (text,) = (text for attributes, text in self.scripts if attributes.get("id") == "data")
        content: dict[str, Any] = json.loads(text)
        return content


def page_of(metrics: Path, **options: Any) -> Page:
    result = report(ReportConfig(metrics=str(metrics), **options))
    return Page(Path(result.out).read_text("utf-8"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_all(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    return page_of(folder)


def test_headline_numbers_have_intervals(page: Page) -> None:
    assert "0.512" in page.texts and "0.492–0.542" in page.text
    assert "0.750" in page.texts
    assert "model of new" in page.texts and "abc123" in page.texts
    assert "1 March 2026" in page.text


def test_the_run_is_the_title_and_its_paths_are_at_the_foot(page: Page, folder: Path) -> None:
    assert page.texts.index("new") < page.texts.index("0.512")
    assert page.text.rindex(str(folder)) > page.text.index("Options of evaluate")


@pytest.mark.parametrize(
    ("run", "model", "title"),
    [
        ("night", "runs/a/checkpoint", "night"),
        ("detections", "s3://bucket/runs/a/checkpoint", "a"),
        ("detections", "PekingU/rtdetr_v2_r18vd", "rtdetr_v2_r18vd"),
        ("detections", None, "detections"),
    ],
)
def test_a_run_named_like_every_folder_of_detections_is_called_after_its_model(
    tmp_path: Path, run: str, model: str | None, title: str
) -> None:
    write_run(tmp_path, run, {"metrics": [{**row, "model": model} for row in metric_rows(run, 0.5)]})
    assert title_of(read_run(str(tmp_path), None)) == title


def test_nothing_to_measure_is_a_dash(page: Page) -> None:
    assert "-1.000" not in page.text and "–" in page.texts


def test_images_left_out_and_unreadable_are_said_at_the_top(page: Page, folder: Path) -> None:
    text = page.text
    assert text.index("2 images left out.") < text.index("0.512")
    assert text.index("1 image could not be read.") < text.index("0.512")
    assert "left out" not in page_of(folder, run="old", out=str(folder / "old.html"), num_images=0).text


def test_the_last_measured_run_is_shown_unless_another_is_named(page: Page, folder: Path) -> None:
    assert "0.401" not in page.text
    other = page_of(folder, run="old", out=str(folder / "old.html"))
    assert "0.401" in other.texts and "0.512" not in other.text
    with pytest.raises(UserError, match=r"'odl'.*'old', 'new'"):
        report(ReportConfig(metrics=str(folder), run="odl"))


def test_nothing_of_the_users_becomes_markup(page: Page, folder: Path) -> None:
    scripts = [attributes.get("type") for attributes, _ in page.scripts]
    assert scripts == ["application/json", "text/plain", None]
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert not page.all("img")
    assert EVIL in page.text and NAMES[2] in page.text and "camera: <rear>" in page.texts
    assert page.charts["classes"] == NAMES
    raw = Path(folder, "report.html").read_text("utf-8")
    assert EVIL not in raw


def test_only_the_scripts_of_the_page_may_run(page: Page) -> None:
    (policy,) = (str(meta["content"]) for meta in page.all("meta") if "http-equiv" in meta)
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'" and rules["img-src"] == "data:"
    allowed = re.findall(r"'sha256-([^']+)'", rules["script-src"])
    own = page.scripts[-1][1]
    assert len(allowed) == 2 and "unsafe" not in rules["script-src"]
    assert base64.b64encode(hashlib.sha256(own.encode()).digest()).decode() in allowed


def test_no_address_on_the_page_is_fetched(page: Page) -> None:
    for tag, attributes in page.elements:
        assert "src" not in attributes and "srcset" not in attributes
        if tag in ("link", "image"):
            assert str(attributes["href"]).startswith("data:")


def test_charts_hold_the_numbers_of_the_run(page: Page) -> None:
    charts = page.charts
    assert charts["confusion"]["cells"] == [[0, 0, 7], [0, 1, 2], [1, 3, 3], [3, 0, 5]]
    assert charts["confusion"]["sums"] == [9, 3, 0, 5]
    assert [(curve["class"], curve["iou"]) for curve in charts["curves"]] == [
        (place, iou) for place in (None, 0, 1) for iou in (0.5, None)
    ]
    assert charts["curves"][0]["recall"][3] == 0.3 and "recall" not in charts["curves"][1]
    assert charts["calibration"][0]["precision"][:2] == [None, 0.1]
    assert charts["errors"]["kinds"][0]["points"] == pytest.approx([7.65] * 3)
    assert sum(charts["images"]["count"]) == 3
    assert charts["training"] is None


def test_boxes_of_a_class_are_counted_from_the_confusion_matrix(page: Page) -> None:
    values = [cell.get("data-value") for cell in page.all("td") if "data-value" in cell]
    per_class = np.array(values).reshape(len(NAMES), 8)
    assert per_class[:, 0].tolist() == ["0.61", "0.32", ""]
    assert per_class[:, -1].tolist() == ["9", "3", "0"]


def test_galleries_show_what_each_is_about(page: Page) -> None:
    tabs = [element["id"] for element in page.all("button") if element.get("role") == "tab"]
    assert tabs == ["tab-false", "tab-missed", "tab-class", "tab-suspects"]
    pictures = [image for image in page.all("image") if str(image["href"]).startswith("data:image/webp;base64,")]
    # false: 1 and 2; missed: 1, 2 and the broken 3; class: 2; suspects: 2
    assert len(pictures) == 6 and "not an image" in page.text
    data = base64.b64decode(str(pictures[0]["href"]).partition(",")[2])
    assert Image.open(io.BytesIO(data)).size == (200, 100)
    points = [rect for rect in page.all("rect") if rect.get("class") == "box found point" and rect["x"] != "2.5"]
    assert ("80.0", "60.0") in [(rect["x"], rect["y"]) for rect in points]
    assert "cat 0.80" in page.texts and "cat 0.10" not in page.text


def test_a_picture_links_to_its_original(page: Page) -> None:
    links = {link["href"] for link in page.all("a") if str(link["href"]).startswith("file:")}
    assert "file:///data/%22%3E%3Cimg%20src%3Dx%20onerror%3Dalert%281%29%3E/1%20%231.png" in links


@pytest.mark.parametrize(
    ("path", "href"),
    [
        ("javascript://%0aalert(1)", None),
        ("javascript:alert(1)", None),
        ("data://text/html,x", None),
        ("s3://bucket/a.png", None),
        ("a/b.png", None),
        ("https://host/a b#1.png", "https://host/a%20b%231.png"),
        ('https://host/"><script>', "https://host/%22%3E%3Cscript%3E"),
        ("https://[bad/a.png", None),
        ("/data/a b.png", "file:///data/a%20b.png"),
    ],
)
def test_only_what_a_browser_opens_is_linked(path: str, href: str | None) -> None:
    assert original_href(path) == href


def test_missing_tables_are_said_in_their_sections(tmp_path: Path) -> None:
    write_run(tmp_path, "new", {"metrics": metric_rows("new", 0.512)})
    page = page_of(tmp_path)
    for table in ("errors", "pr_curves", "confusion", "per_image"):
        assert table in page.texts
    assert "no runs table" in page.text and "0.512" in page.texts
    assert not page.all("image") and page.charts["curves"] is None


def test_pictures_that_are_gone_do_not_stop_the_report(tmp_path: Path) -> None:
    metrics = write_all(tmp_path)
    (tmp_path / "truth").rename(tmp_path / "elsewhere")
    result = report(ReportConfig(metrics=str(metrics)))
    assert len(result.problems) == 2 and all(str(tmp_path / "truth") in problem for problem in result.problems)
    assert all(problem in Page(Path(result.out).read_text("utf-8")).text for problem in result.problems)


def test_more_images_than_asked_for_are_left_out(folder: Path) -> None:
    page = page_of(folder, num_images=1, out=str(folder / "one.html"))
    assert len(page.all("figure")) == 4
    assert not page_of(folder, num_images=0, out=str(folder / "none.html")).all("figure")


def test_training_curves_come_from_the_run_folder(folder: Path, tmp_path: Path) -> None:
    history = [{"epoch": 1, "loss": 3.5, "AP": None}, {"epoch": 2, "loss": float("nan"), "AP": 0.25, "AP50": 0.5}]
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "history.json").write_text(json.dumps(history))
    page = page_of(folder, train_run=str(tmp_path), out=str(tmp_path / "report.html"), num_images=0)
    assert page.charts["training"] == {"epoch": [1, 2], "loss": [3.5, None], "AP": [None, 0.25], "AP50": [None, 0.5]}
    with pytest.raises(UserError, match=r"--train-run .*`raydet train`"):
        report(ReportConfig(metrics=str(folder), train_run=str(folder)))


def test_a_wrong_folder_is_one_clear_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such folder.*nowhere"):
        report(ReportConfig(metrics=str(tmp_path / "nowhere")))
    with pytest.raises(UserError, match=r"metrics table.*raydet evaluate --out"):
        report(ReportConfig(metrics=str(tmp_path)))
    with pytest.raises(UserError, match=rf"is not a metrics folder, but it holds {folder.name}; name one of them"):
        report(ReportConfig(metrics=str(folder.parent)))
    with pytest.raises(UserError, match=rf"single table.*{re.escape(str(folder))}$"):
        report(ReportConfig(metrics=str(folder / "metrics")))
    with pytest.raises(UserError, match=r"--out .*\.html"):
        report(ReportConfig(metrics=str(folder), out=str(tmp_path)))


def test_the_same_tables_give_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    files = [report(ReportConfig(metrics=str(folder), out=str(tmp_path / f"{n}.html"))).out for n in range(2)]
    first, second = (Path(file).read_bytes() for file in files)
    assert first == second and len(first) < 4e6

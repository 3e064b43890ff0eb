"""`--json`, `--quiet` and `--open` of every command that runs without Ray, held against docs/json_output.md."""

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import raydet
from raydet.cli.commands import COMMANDS
from raydet.cli.main import main
from raydet.common.display.json_form import json_fields
from raydet.config.fields import field_names
from raydet.config.output import OutputOptions
from raydet.preparation.sources.shapes import CATEGORIES
from tests.json_output import documented, parse_output
from tests.small_sets import annotation, save_coco, save_image

Objects = list[dict[str, Any]]


@pytest.mark.parametrize("name", COMMANDS)
def test_the_page_lists_the_fields_of_every_result(name: str) -> None:
    result_class = inspect.signature(getattr(raydet, COMMANDS[name].function)).return_annotation
    assert documented(name) == list(json_fields(result_class))
    assert not {"type", "schema_version", "command", "exit_code"} & set(json_fields(result_class))
    assert not set(field_names(OutputOptions)) & set(field_names(COMMANDS[name].config))
    assert hasattr(result_class, "page") or "page" in json_fields(result_class) or not COMMANDS[name].writes_page


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Objects]:
    """Run a command with `--json`, check its objects against the page, and return them."""

    def run_command(*words: str) -> Objects:
        capsys.readouterr()
        assert main([*words, "--json"]) == 0
        command = " ".join(words[:2]) if words[0] in ("prepare", "export") else words[0]
        return parse_output(capsys.readouterr().out, command)

    return run_command


def _detections(truth: Path, path: Path) -> str:
    """Write COCO results of random boxes for a COCO file."""
    rng, images = np.random.default_rng(0), json.loads(truth.read_text())["images"]
    rows = [
        {"image_id": image["id"], "category_id": 5, "bbox": [1, 2, 20 + 5 * rng.random(), 20], "score": rng.random()}
        for image in images
    ]
    path.write_text(json.dumps(rows))
    return str(path)


def test_from_annotations_to_numbers_and_back(tmp_path: Path, run: Callable[..., Objects]) -> None:
    """Check `prepare` of several formats, `export`, `evaluate`, `compare` and `report`."""
    images = [{"id": number, "file_name": f"{number}.jpg", "width": 40, "height": 30} for number in range(1, 7)]
    for number in range(1, 7):
        save_image(tmp_path / "images" / f"{number}.jpg", seed=number)
    save_image(tmp_path / "images" / "alone.jpg")
    boxes = [annotation(number, [1, 2, 20, 20], image_id=number) for number in range(1, 7)]
    truth = save_coco(tmp_path, images, boxes)
    table, folder = str(tmp_path / "table"), str(tmp_path / "images")
    objects = run("prepare", "coco", "--annotations", truth, "--images", folder, "--out", table)
    assert objects[-1]["boxes_by_class"] == {"cell": 6} and objects[-1]["tables"] == {}
    tasks = [(item["task"], item["completed"], item["total"]) for item in objects if item["type"] == "progress"]
    assert tasks[-1] == ("preparing", 6, 6)
    assert run("prepare", "coco", "--annotations", truth, "--images", folder, "--out", table)[-1]["already_done"]
    for name in ("coco", "voc", "yolo", "cvat", "label-studio"):
        out = str(tmp_path / name) + (".json" if name == "coco" else "")
        assert run("export", name, "--data", table, "--out", out)[-1]["num_boxes"] == 6
    sources = {
        "voc": ["--annotations", f"{tmp_path}/voc/Annotations", "--images", f"{tmp_path}/voc/JPEGImages"],
        "yolo": ["--data", f"{tmp_path}/yolo/data.yaml"],
        "cvat": ["--annotations", f"{tmp_path}/cvat/annotations.xml", "--images", f"{tmp_path}/cvat/images"],
        "label-studio": [
            *("--annotations", f"{tmp_path}/label-studio/tasks.json", "--images", f"{tmp_path}/label-studio/images"),
        ],
        "images": ["--images", folder],
    }
    for name, options in sources.items():
        out = str(tmp_path / f"again-{name}")
        assert run("prepare", name, *options, "--out", out, "--val-fraction", "0.3")[-1]["accepted"] >= 6

    found, metrics = _detections(Path(truth), tmp_path / "found.json"), str(tmp_path / "metrics")
    measured = run(
        *("evaluate", "--truth", table, "--detections", found, "--out", metrics, "--bootstrap", "20", "--run", "a")
    )[-1]
    assert measured["result"]["values"]["AP50"] == pytest.approx(1) and measured["result"]["values"]["APl"] is None
    assert "precision" not in measured["result"]
    compared = run("compare", "--truth", table, "--first", found, "--second", found, "--bootstrap", "20")[-1]
    assert compared["numbers"]["difference"]["overall"]["AP"]["value"] == 0
    page = run("report", "--metrics", metrics)[-1]["out"]
    assert Path(page).read_text().startswith("<!")


@pytest.mark.parametrize(
    ("words", "command", "fact"),
    [
        (["evaluate", "--truth", "absent", "--detections", "absent"], "evaluate", "absent"),
        (["train", "--epochz", "3"], "train", "--epochs"),
        (["trian"], None, "`train`"),
    ],
)
def test_an_error_is_an_object_with_the_same_exit_code(
    words: list[str], command: str | None, fact: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--json"]) == 2
    (error,) = parse_output(capsys.readouterr().out, command, exit_code=2)
    assert error["type"] == "error" and fact in error["message"]


def test_quiet_prints_the_result_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shapes = ["prepare", "shapes", "--num-train", "4", "--num-val", "3", "--image-size", "64", "--quiet"]
    assert main([*shapes, "--out", str(tmp_path / "a")]) == 0
    quiet = capsys.readouterr()
    assert quiet.err == "" and len(quiet.out.splitlines()) > 2
    assert main([*shapes, "--json", "--out", str(tmp_path / "b")]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["boxes_by_class"].keys() == {category.name for category in CATEGORIES}


def test_output_options_are_no_part_of_a_config(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["demo", "--print-config", "--json", "--quiet"])
    assert not {"json", "quiet", "open"} & {line.partition(":")[0] for line in capsys.readouterr().out.splitlines()}


def test_open_is_refused_where_no_page_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["prepare", "shapes", "--out", str(out), "--open"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "writes no page" in error and "`report`" in error
    assert not out.exists()


def test_open_shows_the_page_in_the_browser_or_says_where_it_is(tmp_path: Path) -> None:
    browser, opened = tmp_path / "browser", tmp_path / "opened"
    browser.write_text(f'#!/bin/sh\necho "$1" > {opened}\n')
    browser.chmod(0o755)
    page = tmp_path / "a page.html"
    page.write_text("<!doctype html>")

    def open_page(uri: str, **environment: str) -> str:
        code = f"from raydet.cli.pages import open_page; open_page({uri!r})"
        run = subprocess.run(
            [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, timeout=60
        )
        assert run.returncode == 0, run.stderr
        return run.stderr

    assert open_page(str(page), BROWSER=f"{browser} %s") == ""
    assert opened.read_text().strip() == page.as_uri()
    assert "not on this machine" in open_page("s3://bucket/page.html")
    assert str(page) in open_page(str(page), PATH=str(tmp_path), BROWSER="absent", DISPLAY="")

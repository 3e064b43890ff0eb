"""The demo, and the examples of all help pages, which use its results."""

import csv
import json
import os
import shlex
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest

import raydet
from raydet.cli.commands import COMMANDS
from raydet.cli.main import main
from tests.json_output import check_result

ON_THE_HUB = {"prepare hub", "push", "crops"}
"""Commands whose examples need the Hub."""


def run(name: str, *more: str) -> None:
    if name == "browse":  # serves until Ctrl-C
        threading.Thread(target=_interrupt, daemon=True).start()
    assert main([*shlex.split(f"{name} {COMMANDS[name].example}"), *more]) == 0, name


def _interrupt() -> None:
    """Press Ctrl-C once the main thread serves, which is when it notes requests to stop."""
    while "noting_stop_requests" not in getattr(signal.getsignal(signal.SIGINT), "__qualname__", ""):
        time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGINT)


def write_inputs() -> None:
    """Write the files that the examples of `prepare` read, in the formats to which `export` writes."""
    data = "runs/demo/data/train"
    for line in (
        f"export coco --data {data} --out annotations/instances_train.json",
        f"export voc --data {data} --out made/voc",
        f"export yolo --data {data} --out made/yolo",
        f"export cvat --data {data} --out made/cvat",
        f"export label-studio --data {data} --out made/label-studio",
    ):
        assert main(line.split()) == 0
    for source, target in (
        ("voc/Annotations", "Annotations"),
        ("voc/JPEGImages", "JPEGImages"),
        ("voc/JPEGImages", "images/train"),
        ("cvat/images", "images"),
        ("cvat/images", "photos"),
        ("yolo/labels", "labels"),
    ):
        shutil.copytree(Path("made", source), target, dirs_exist_ok=True)
    shutil.copy("made/yolo/data.yaml", "data.yaml")
    shutil.copy("made/cvat/annotations.xml", "annotations.xml")
    (project,) = Path("made/label-studio").glob("*.json")
    shutil.copy(project, "project.json")
    coco = json.loads(Path("annotations/instances_train.json").read_text())
    files = {image["id"]: image["file_name"] for image in coco["images"]}
    names = {category["id"]: category["name"] for category in coco["categories"]}
    with Path("labels.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "xmin", "ymin", "xmax", "ymax", "label"])
        for one in coco["annotations"]:
            x, y, width, height = one["bbox"]
            rows.writerow([files[one["image_id"]], x, y, x + width, y + height, names[one["category_id"]]])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_demo_runs_twice_in_one_process_and_all_examples_follow_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = raydet.demo(raydet.DemoConfig(out="runs/again", num_train=32, num_val=8, epochs=1))
    assert Path(result.page).exists()
    assert check_result(result, "demo")["evaluation"]["result"]["num_images"] == 8
    run("demo", "--num-train", "32", "--num-val", "8", "--epochs", "1")
    write_inputs()
    for name in COMMANDS:
        if name.startswith("prepare "):
            shutil.rmtree("data", ignore_errors=True)
        if name != "demo" and name not in ON_THE_HUB:
            run(name)
    shutil.copy(min(Path("photos").rglob("*.jpg")), "photo.jpg")
    assert main(["predict", "--checkpoint", "runs/demo/checkpoint", "--data", "photo.jpg"]) == 0
    assert Path("photo.detections.jpg").exists()

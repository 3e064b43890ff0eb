"""Pushed tables are a data set: `datasets.load_dataset` opens a copy of the repository with splits and class names."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import raydet
from raydet.cli.main import main
from raydet.common.errors import UserError
from raydet.config import EvaluateConfig, PrepareCocoConfig, PrepareHubConfig, PushConfig
from raydet.preparation.prepare import prepare_coco, prepare_hub
from raydet.tables.schema import Category, build_schema
from raydet.tables.table import TableWriter, open_table
from tests.exports.test_hub import Hub, hub
from tests.json_output import parse_output
from tests.small_sets import files_below, rows_of

__all__ = ["hub"]
NAMES = ["owl & [bird]", "no: yes", "7"]
CATEGORIES = [Category(9, NAMES[0]), Category(2, NAMES[1]), Category(5, NAMES[2])]
REPO = "ann/parking"


def write_table(folder: Path, rows: list[dict[str, Any]], *, num_files: int = 1) -> Path:
    kind: Any = "images" if "image" in rows[0] else "detections"
    with TableWriter(
        str(folder), build_schema(kind, CATEGORIES), config_hash="x", file_bytes=1 if num_files > 1 else 2**20
    ) as writer:
        for part in range(num_files):
            writer.write_rows(rows[part::num_files])
            writer.flush()
    return folder


def image(image_id: int, *, data: bytes | None = b"pixels", path: str = "") -> dict[str, Any]:
    objects = {
        "id": [image_id + 1, image_id + 2],
        "bbox": [[0.1, 2.5, 3.0, 4.0], [1.0, 1.0, 2.0, 2.0]],
        "category": [image_id % 3, 2],
        "area": [12.0, 3.5],
        "iscrowd": [False, True],
    }
    image = {"bytes": data, "path": path or f"{image_id}.jpg"}
    return {"image_id": image_id, "image": image, "width": 64, "height": 48, "objects": objects}


def detection(image_id: int, path: str) -> dict[str, Any]:
    found = {"bbox": [[0.5, 1.0, 2.0, 3.0]], "score": [0.75], "category": [image_id % 3]}
    size = {"width": 64, "height": 48}
    return {"image_id": image_id, "path": path, "detections": found, "error": None, **size}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Folder as `prepare --val-fraction` writes it, with other files in it."""
    folder = tmp_path / "data"
    write_table(folder / "train", [image(number) for number in range(6)], num_files=3)
    write_table(folder / "val", [image(10)])
    write_table(folder / "_rejected", [image(99)])
    for name in (".env", "train/notes.txt", "train/left-over.parquet"):
        (folder / name).write_text("secret")
    return folder


def card_of(hub: Hub) -> tuple[dict[str, Any], str]:
    """Return the metadata and the text of the pushed card."""
    _, head, text = hub.repos[REPO].branches["main"].files["README.md"].decode().split("---\n", 2)
    return yaml.safe_load(head), text


def load_copy(hub: Hub, folder: Path, script: str) -> Any:
    """Run a script with `load_dataset` on a copy of the repository, and return the JSON that it prints last."""
    hub.save(REPO, folder)
    environment = {**os.environ, "HF_HOME": str(folder.parent / "hf"), "HF_HUB_OFFLINE": "1"}
    code = f"import json, sys\nfrom datasets import Image, load_dataset\nrepo = {str(folder)!r}\n{script}"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_images_become_a_data_set_with_splits_and_class_names(hub: Hub, data: Path, tmp_path: Path) -> None:
    result = raydet.push(PushConfig(data=str(data), repo=REPO, license="cc-by-4.0"))
    files = hub.repos[REPO].branches["main"].files
    parquet = {f"train/part-0000{number}.parquet" for number in range(3)} | {"validation/part-00000.parquet"}
    assert set(files) == {*parquet, "README.md", ".gitattributes"}
    assert all(files[name] == (data / name.replace("validation", "val")).read_bytes() for name in parquet)
    assert hub.commits == [(REPO, "main", {"README.md": "file", **dict.fromkeys(sorted(parquet), "lfsFile")})]
    create = json.loads(hub.asked("POST /api/repos/create")[0][1])
    assert create["type"] == "dataset" and set(result.files) == {*parquet, "README.md"}
    assert result.url == f"{hub.endpoint}/datasets/{REPO}" and result.lines()[-1] == f"data set: {result.url}"
    assert not result.notes

    metadata, text = card_of(hub)
    assert (metadata["license"], metadata["task_categories"]) == ("cc-by-4.0", ["object-detection"])
    assert metadata["size_categories"] == "n<1K"
    assert "| train | 6 | 12 |" in text and "| validation | 1 | 2 |" in text
    assert r"| 0 | owl \& \[bird\] | 2 | 0 |" in text and "| 2 | 7 | 8 | 1 |" in text
    assert f"raydet prepare hub --dataset {REPO} --split train" in text and str(tmp_path) not in text

    script = """
data = load_dataset(repo).cast_column("image", Image(decode=False))
rows = {split: list(own) for split, own in data.items()}
names = data["train"].features["objects"]["category"].feature.names
for row in (row for own in rows.values() for row in own):
    row["image"]["bytes"] = row["image"]["bytes"].decode()
print(json.dumps([names, rows]))
"""
    names, rows = load_copy(hub, tmp_path / "copy", script)
    assert names == NAMES
    for split, folder in (("train", "train"), ("validation", "val")):
        expected = rows_of(data / folder)
        for row in expected:
            row["image"]["bytes"] = row["image"]["bytes"].decode()
        assert rows[split] == expected


def test_the_copy_is_an_images_table_again(hub: Hub, test_data: Path, tmp_path: Path) -> None:
    """Check ids, crowds, names and boxes of real labels on the way to the Hub and back."""
    source = test_data / "coco_mini"
    out = str(tmp_path / "table")
    prepare_coco(PrepareCocoConfig(annotations=str(source / "instances_val.json"), images=str(source / "val"), out=out))
    raydet.push(PushConfig(data=out, repo=REPO))
    hub.save(REPO, tmp_path / "copy")
    again = str(tmp_path / "again")
    prepare_hub(PrepareHubConfig(dataset=str(tmp_path / "copy"), out=again))
    first, second = rows_of(out), rows_of(again)
    assert [row["image_id"] for row in first] == [row["image_id"] for row in second]
    for mine, other in zip(first, second, strict=True):
        assert all(mine[key] == other[key] for key in ("image", "width", "height", "objects"))
    names, others = ([item.name for item in open_table(uri, "images").categories] for uri in (out, again))
    assert names == others and sum(sum(row["objects"]["iscrowd"]) for row in first) > 0


def test_detections_and_metrics(hub: Hub, data: Path, tmp_path: Path) -> None:
    rows = [detection(number, f"/home/alice/{number}.jpg") for number in range(6)]
    found = str(write_table(tmp_path / "detections", rows))
    result = raydet.push(PushConfig(data=found, repo=REPO))
    assert result.notes == (
        f"whoever may read {REPO} sees the absolute paths or URIs in the columns path",
    ) and result.lines()[0].startswith("note: ")
    metadata, text = card_of(hub)
    assert "task_categories" not in metadata and "| train | 6 | 6 |" in text and "prepare hub" not in text
    script = """
rows = load_dataset(repo, split="train")
label = rows.features["detections"]["category"].feature
print(json.dumps([[label.int2str(number) for number in row["detections"]["category"]] for row in rows]))
"""
    assert load_copy(hub, tmp_path / "copy", script) == [[NAMES[number % 3]] for number in range(6)]

    hub.repos.clear()
    for name in ("first", "second"):
        raydet.evaluate(
            EvaluateConfig(
                truth=str(data / "train"),
                detections=found,
                out=str(tmp_path / "metrics"),
                bootstrap=20,
                run=name,
                join="id",
            )
        )
    raydet.push(PushConfig(data=str(tmp_path / "metrics"), repo=REPO))
    metadata, text = card_of(hub)
    assert {item["config_name"] for item in metadata["configs"]} >= {"metrics", "per_image", "runs", "errors"}
    files = hub.repos[REPO].branches["main"].files
    assert {"metrics/first.parquet", "metrics/second.parquet", "runs/first.parquet"} <= set(files)
    script = """
metrics = load_dataset(repo, split="train")
wanted = ("AP", None, None)
found = {row["run"]: row["value"] for row in metrics if (row["metric"], row["category"], row["slice"]) == wanted}
runs = load_dataset(repo, "runs", split="train")
print(json.dumps([found, list(runs["num_images"]), [str(value) for value in runs["time"]]]))
"""
    values, num_images, times = load_copy(hub, tmp_path / "metrics-copy", script)
    assert values.keys() == {"first", "second"} and num_images == [6, 6] and all("20" in time for time in times)


def test_pushing_again_leaves_no_row_twice(hub: Hub, data: Path, tmp_path: Path) -> None:
    raydet.push(PushConfig(data=str(data), repo=REPO))
    assert raydet.push(PushConfig(data=str(data), repo=REPO)).already_done
    main_branch = hub.repos[REPO].branches["main"]
    main_branch.files |= {"train/notes.md": b"kept", "other/part-00000.parquet": b"kept"}
    write_table(tmp_path / "train", [image(number) for number in range(6)])
    raydet.push(PushConfig(data=str(tmp_path / "train"), repo=REPO))
    left = set(hub.repos[REPO].branches["main"].files)
    assert {name for name in left if name.startswith("train/")} == {"train/part-00000.parquet", "train/notes.md"}
    assert {"other/part-00000.parquet", "validation/part-00000.parquet"} < left
    script = """
data = load_dataset(repo)
print(json.dumps({split: list(own["image_id"]) for split, own in data.items()}))
"""
    assert load_copy(hub, tmp_path / "copy", script) == {"train": list(range(6))}


def test_a_table_in_a_bucket_and_a_branch(hub: Hub, data: Path, bucket: str) -> None:
    from raydet.tables import storage

    for name in files_below(data / "val"):
        storage.write_bytes(f"{bucket}/data/val/{name}", (data / "val" / name).read_bytes())
    result = raydet.push(PushConfig(data=f"{bucket}/data/val", repo=REPO, revision="trial/one", private=True))
    repo = hub.repos[REPO]
    files = repo.branches["trial/one"].files
    assert repo.private and files["validation/part-00000.parquet"] == (data / "val/part-00000.parquet").read_bytes()
    assert result.url.endswith("/tree/trial/one") and b"@trial%2Fone" in files["README.md"]


def test_mistakes_are_told_before_the_hub_is_asked(hub: Hub, data: Path, tmp_path: Path) -> None:
    write_table(tmp_path / "references", [image(0, data=None, path="/home/alice/0.jpg")])
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "train").symlink_to(data / "train")
    write_table(tmp_path / "two" / "val", [detection(0, "0.jpg")])
    write_table(tmp_path / "linked", [image(0)])
    part = tmp_path / "linked" / "part-00000.parquet"
    part.rename(tmp_path / "elsewhere.parquet")
    part.symlink_to(tmp_path / "elsewhere.parquet")
    write_table(tmp_path / "damaged", [image(0)])
    write_table(tmp_path / "more", [image(0), image(1)])
    (tmp_path / "damaged" / "part-00000.parquet").write_bytes((tmp_path / "more" / "part-00000.parquet").read_bytes())
    for name, message in {
        "absent": "must be a table",
        "references": "--image-storage inline",
        "two": "different kinds",
        "linked": "link",
        "damaged": "damaged",
    }.items():
        with pytest.raises(UserError, match=message) as caught:
            raydet.push(PushConfig(data=str(tmp_path / name), repo=REPO))
        assert "\n" not in str(caught.value)
    for options in ({}, {"data": "a", "checkpoint": "b"}, {"data": "a", "metrics": "b"}):
        with pytest.raises(UserError, match=r"--checkpoint|--metrics"):
            PushConfig(repo=REPO, **options)  # type: ignore[arg-type]
    assert hub.requests == []


def test_the_command(hub: Hub, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", "--data", str(data), "--repo", REPO]) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-1] == f"data set: {hub.endpoint}/datasets/{REPO}" and captured.err == ""
    assert main(["push", "--data", str(data), "--repo", REPO, "--json"]) == 0
    assert parse_output(capsys.readouterr().out, "push")[-1]["already_done"]
    assert main(["push", "--repo", REPO]) == 2
    assert "push takes either --checkpoint or --data" in capsys.readouterr().err

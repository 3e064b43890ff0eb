"""`predict --adapter` writes the rows of each merged checkpoint, from one decoding pass, and resumes like any run."""

import dataclasses
import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from raydet import EvaluateConfig, PredictConfig, PrepareShapesConfig, UserError, evaluate, predict, prepare_shapes
from raydet.augmentation.view import decoded
from raydet.cli.main import main
from raydet.models.loading import load_detector
from raydet.scoring import blocks
from raydet.scoring.predict import predict_with
from raydet.tables.layout import MANIFEST_NAME
from raydet.tables.schema import parse_metadata
from raydet.tables.table import open_table
from tests.adapted_models import save_adapted
from tests.drivers import command_of, started, wait_for_progress
from tests.json_output import check_result, parse_output
from tests.outcomes import Rows, assert_same_rows
from tests.scoring.test_faults import PLACES, environment
from tests.small_sets import rows_of
from tests.vision_transformers import save_pretrained

SIDE = 96
CLASSES = {"cars": ("car", "van", "cat", "dog"), "pets": ("dog", "bus"), "shapes": ("ellipse", "rectangle", "triangle")}


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folder of the merged model of each run, beside which lies its adapter, and of their base."""
    folder = tmp_path_factory.mktemp("adapters")
    base = save_pretrained("rf_detr_tiny", folder / "base", side=SIDE)
    return {"base": base} | {
        name: save_adapted(base, folder / name, classes, seed=seed)[1]
        for seed, (name, classes) in enumerate(CLASSES.items())
    }


@pytest.fixture(scope="module")
def config(merged: dict[str, str], tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> PredictConfig:
    """A run with three adapters over a folder of eleven images, one of which cannot be read."""
    folder = tmp_path_factory.mktemp("data")
    for number, row in enumerate(rows_of(shapes / "train")[:10]):
        picture = Image.open(io.BytesIO(row["image"]["bytes"]))
        picture.crop((0, 0, 64, 40 + 2 * number)).save(folder / f"{number}.png")
    (folder / "4b.png").write_bytes(b"no image")
    return PredictConfig(
        checkpoint=merged["base"],
        adapter=[_adapter(merged, name) for name in ("shapes", "cars", "pets")],
        data=str(folder),
        out=str(folder.parent / "found"),
        batch_size=2,
        rows_per_file=4,
        threads_per_worker=1,
    )


def _adapter(merged: dict[str, str], name: str) -> str:
    return str(Path(merged[name]).parent / "adapter")


def _assert_as_merged(run: PredictConfig, merged: dict[str, str], folder: Path) -> None:
    """Check the tables of a run against those of the merged checkpoints."""
    for name in CLASSES:
        alone = dataclasses.replace(run, checkpoint=merged[name], adapter=None, out=str(folder / f"{name}-merged"))
        predict_with(alone, in_process=True)
        mine, its = (open_table(uri, "detections") for uri in (f"{run.out}/{name}", alone.out))
        assert mine.categories == its.categories and mine.schema.names == its.schema.names
        assert_same_rows(rows_of(mine.uri, "detections"), rows_of(its.uri, "detections"))


def test_each_table_is_that_of_the_merged_model_and_images_are_decoded_once(
    config: PredictConfig, merged: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[bytes] = []

    def counting(data: bytes, **options: Any) -> Any:
        calls.append(data)
        return decoded(data, **options)

    monkeypatch.setattr(blocks, "decoded", counting)
    run = dataclasses.replace(config, out=str(tmp_path / "found"), draw=2)
    result = predict_with(run, in_process=True)
    assert len(calls) == 11
    _assert_as_merged(run, merged, tmp_path)

    assert (result.num_images, result.num_errors, list(result.adapters)) == (11, 1, ["cars", "pets", "shapes"])
    assert result.num_detections == sum(each.num_detections for each in result.adapters.values()) > 0
    assert result.unreadable.keys() == {"4b.png"}
    assert f"detections of pets: {tmp_path}/found/pets" in "\n".join(result.lines())
    check_result(result, "predict")
    for name, each in result.adapters.items():
        assert each.out == f"{tmp_path}/found/{name}" and each.adapter == _adapter(merged, name)
        assert len(list(Path(each.out, "__drawn").glob("*.jpg"))) == 2
        content = parse_metadata(open_table(each.out).schema, kind="detections", where=each.out)
        assert (content["checkpoint"], content["base"]) == (each.adapter, merged["base"])
        assert content["checkpoint_hash"] and content["base_hash"]
    assert sorted(path.name for path in Path(run.out).iterdir() if not path.name.startswith(".")) == sorted(CLASSES)
    again = predict(run)
    assert again.already_done and again.adapters == result.adapters
    with pytest.raises(UserError, match=r"already holds another run \(--adapter: \[.*\] → \[[^;]*\]\); choose"):
        predict(dataclasses.replace(run, adapter=run.adapters[:2]))
    with pytest.raises(UserError, match="is not a table, but it holds the tables cars, pets, shapes"):
        open_table(run.out)


@pytest.mark.parametrize(
    "options",
    [
        {"tile": 64, "tile_overlap": 0.0, "flip": True, "merge": "wbf"},
        {"keep": ["class_scores", "embedding"], "top_k": 5},
        {"resize_on": "device", "precision": "bf16", "score_threshold": 0.3},
    ],
    ids=["tile-flip", "keep", "device-bf16"],
)
def test_with_other_options(
    config: PredictConfig, merged: dict[str, str], tmp_path: Path, options: dict[str, Any]
) -> None:
    run = dataclasses.replace(config, out=str(tmp_path / "found"), **options)
    predict_with(run, in_process=True)
    _assert_as_merged(run, merged, tmp_path)


def test_evaluate_takes_a_table_as_it_is(merged: dict[str, str], shapes: Path, tmp_path: Path) -> None:
    options: Any = {"data": str(shapes / "val"), "batch_size": 4, "threads_per_worker": 1}
    predict(PredictConfig(checkpoint=merged["base"], adapter=_adapter(merged, "shapes"), out=str(tmp_path), **options))
    predict(PredictConfig(checkpoint=merged["shapes"], out=str(tmp_path / "merged"), **options))
    values = [
        evaluate(EvaluateConfig(truth=str(shapes / "val"), detections=str(tmp_path / name))).result.values
        for name in ("shapes", "merged")
    ]
    assert values[0] == values[1]


def test_a_chunk_without_a_file_in_one_table_is_scored_again(config: PredictConfig, tmp_path: Path) -> None:
    run = dataclasses.replace(config, out=str(tmp_path / "found"))
    predict_with(run, in_process=True)
    rows = {name: rows_of(f"{run.out}/{name}", "detections") for name in CLASSES}
    (tmp_path / "found" / "cars" / MANIFEST_NAME).unlink()
    lost = tmp_path / "found" / "pets" / "part-0000001.parquet"
    kept = [path for path in lost.parents[1].glob("*/part-*") if path.name != lost.name]
    times = [path.stat().st_mtime_ns for path in kept]
    lost.unlink()
    assert not predict_with(run, in_process=True).already_done
    assert [path.stat().st_mtime_ns for path in kept] == times
    for name, expected in rows.items():
        assert_same_rows(rows_of(f"{run.out}/{name}", "detections"), expected)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"engine": "openvino"}, "--adapter needs --engine torch, got openvino"),
        ({"compile": True}, "--compile cannot be combined with --adapter: torch would compile a graph per adapter"),
        ({"operating_point": True}, "--operating-point cannot be combined with --adapter"),
        ({"checkpoint": None, "model": "a/b", "labels": ["cat"]}, "--adapter needs --checkpoint"),
        ({"checkpoint": None, "model": "a/b", "examples": "x"}, "--adapter needs --checkpoint"),
        ({"adapter": []}, "--adapter must name folders"),
        ({"adapter": "a/adapter,b/adapter"}, "no such folder; .*; separate several folders by blanks"),
        ({"data": "photo.jpg"}, "--adapter.* cannot be combined with pictures"),
        ({"classes": ["dog"]}, "--adapter .*/shapes/adapter: --classes: the model has no class dog"),
        ({"checkpoint": "pets"}, "does not fit --checkpoint .*pets/checkpoint: it was trained beside frozen weights"),
        ({"checkpoint": "yolos"}, "adapts a rf_detr model, but --checkpoint .*/yolos is a yolos model"),
    ],
    ids=str,
)
def test_mistakes_are_one_line_before_anything_is_written(
    config: PredictConfig, merged: dict[str, str], tmp_path: Path, options: dict[str, Any], reason: str
) -> None:
    if options.get("checkpoint") == "yolos":
        save_pretrained("yolos_tiny", tmp_path / "yolos", side=SIDE)
        options = {"checkpoint": str(tmp_path / "yolos")}
    elif options.get("checkpoint"):
        options = {"checkpoint": merged[options["checkpoint"]]}
    with pytest.raises(UserError, match=reason) as error:
        predict(dataclasses.replace(config, **{"out": str(tmp_path / "found"), **options}))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "found").exists()


def test_a_changed_adapter_is_another_run(
    config: PredictConfig, merged: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, _ = save_adapted(merged["base"], tmp_path / "mine", ("dog",), seed=7)
    words = [f"--checkpoint={merged['base']}", f"--data={config.data}", f"--out={tmp_path / 'found'}", "--json"]
    words += ["--threads-per-worker=1", "--adapter", adapter, _adapter(merged, "pets")]
    assert main(["predict", *words]) == 0
    result = parse_output(capsys.readouterr().out, "predict")[-1]
    assert {name: [*each] for name, each in result["adapters"].items()} == {
        name: ["out", "adapter", "num_detections"] for name in ("mine", "pets")
    }
    load_detector(str(tmp_path / "mine" / "checkpoint")).processor.save_pretrained(adapter)
    (Path(adapter) / "note.txt").write_text("another")
    assert main(["predict", *words]) == 2
    message = parse_output(capsys.readouterr().out, "predict", exit_code=2)[-1]["message"]
    assert "the weights or settings of an adapter have changed since" in message


NUM_IMAGES, ROWS_PER_FILE = 400, 10


@pytest.fixture(scope="module")
def long(
    merged: dict[str, str], tmp_path_factory: pytest.TempPathFactory, ray_cluster: None
) -> tuple[PredictConfig, dict[str, Rows]]:
    """An undisturbed run over many images, and its rows by adapter."""
    folder = tmp_path_factory.mktemp("long")
    prepare_shapes(PrepareShapesConfig(out=str(folder), num_train=NUM_IMAGES, num_val=4, image_size=64, max_shapes=3))
    config = PredictConfig(
        checkpoint=merged["base"],
        adapter=[_adapter(merged, name) for name in CLASSES],
        data=str(folder / "train"),
        out=str(folder / "undisturbed"),
        batch_size=5,
        rows_per_file=ROWS_PER_FILE,
        threads_per_worker=1,
    )
    predict_with(config, in_process=True)
    return config, {name: rows_of(f"{config.out}/{name}", "detections") for name in CLASSES}


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("place", PLACES)
def test_a_killed_run_resumes(long: tuple[PredictConfig, dict[str, Rows]], tmp_path: Path, place: str) -> None:
    config = dataclasses.replace(long[0], out=str(tmp_path / "d"))
    output, last = tmp_path / "output", list(CLASSES)[-1]
    with started(command_of("predict", config), output, env=environment(place)) as driver:
        wait_for_progress(lambda: len(list((tmp_path / "d" / last).glob("part-*"))) >= 10, driver, output)
    done = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "d" / last).glob("part-*")}
    assert len(done) < NUM_IMAGES // ROWS_PER_FILE, "killed too late to tell"
    predict_with(config, in_process=place != "cluster")
    assert {name: (tmp_path / "d" / last / name).stat().st_mtime_ns for name in done} == done
    for name, rows in long[1].items():
        assert len({row["image_id"] for row in rows}) == NUM_IMAGES
        assert_same_rows(rows_of(f"{config.out}/{name}", "detections"), rows)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_two_workers_write_the_same_rows(long: tuple[PredictConfig, dict[str, Rows]], tmp_path: Path) -> None:
    config = dataclasses.replace(long[0], out=str(tmp_path / "d"), num_workers=2)
    predict_with(config, in_process=False)
    for name, rows in long[1].items():
        assert_same_rows(rows_of(f"{config.out}/{name}", "detections"), rows)

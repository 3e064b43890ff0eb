"""INT8 is taken only with a proof of its AP and speed; otherwise the figures say why not."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import raydet
from raydet import UserError
from raydet.engines.openvino.graph import trace
from raydet.exports.openvino import proof as proofs
from raydet.exports.openvino import trials
from raydet.exports.openvino.levels import LAYERS, LEVELS, FloatParts, nodes_of
from raydet.exports.openvino.proof import FloatTrial, Int8Proof, Int8Trial
from raydet.images.decode import decode
from raydet.models.loading import load_detector
from raydet.preparation.sources.shapes import encode
from raydet.tables.schema import Category, build_schema
from raydet.tables.table import TableWriter
from tests.engines.test_engines import CATEGORIES, found_by, pictures, tiny
from tests.json_output import check_result


def trial(**values: Any) -> Int8Trial:
    given: dict[str, Any] = {"level": "all layers", "precision": "bf16", "num_int8": 9, "num_float": 1}
    return Int8Trial(**{**given, "images_per_s": 20.0, "speedup": 2.0, **values})


def proof_of(*tried: Int8Trial, taken: int | None) -> Int8Proof:
    return Int8Proof(
        calibration="c",
        num_calibration_images=300,
        truth="t",
        num_images=1000,
        max_ap_drop=0.005,
        num_threads=1,
        instructions=("avx512_vnni",),
        ap_float=0.5,
        floats=(FloatTrial(precision="fp32", images_per_s=10.0),),
        trials=tried,
        taken=taken,
        kernels={},
    )


def test_a_trial_passes_by_its_interval_and_its_speed() -> None:
    measured = {"ap": 0.499, "difference": -0.001, "low": -0.004, "high": 0.002}
    assert trial(**measured).passes(0.005)
    assert not trial(**measured).passes(0.003)
    assert not trial(**measured, speedup=1.01).passes(0.005)
    assert not trial(ap=0.5, difference=0.0).passes(0.005)


def test_the_figures_say_what_follows_from_them() -> None:
    lost = {"ap": 0.45, "difference": -0.05, "low": -0.06, "high": -0.04}
    lines = proof_of(trial(**lost), taken=None).lines()
    assert "1,000 images, speed with 1 thread, CPU: avx512_vnni" in lines[0]
    assert "9 of 10" in lines[3] and "-0.0600 … -0.0400" in lines[3]
    assert "excludes a loss of more than 0.005 AP; nothing was written" in lines[-1]
    assert "too few images" in proof_of(trial(ap=0.5, difference=0.0), taken=None).lines()[-1]
    assert "at least 1.05 times as fast" in proof_of(trial(speedup=0.9), taken=None).lines()[-1]
    assert "--precision bf16" in proof_of(trial(), taken=0).lines()[-1]


@pytest.mark.parametrize(("num_rows", "num_wanted"), [(1000, 300), (1000, 10), (20, 300), (40, 40), (8, 7), (1, 300)])
def test_images_to_calibrate_with_come_from_all_parts(num_rows: int, num_wanted: int) -> None:
    ranges = trials.rows_of_all_parts(num_rows, num_wanted)
    rows = [row for own in ranges for row in own]
    assert len(rows) == min(num_rows, num_wanted) and rows == sorted(set(rows)) and rows[-1] < num_rows
    assert all(0 < len(own) <= 16 for own in ranges)
    assert num_rows < 8 or rows[-1] >= num_rows * 7 // 8


@pytest.mark.usefixtures("one_thread")
def test_each_level_leaves_more_in_float(tmp_path: Path) -> None:
    detector = load_detector(str(tiny("rt_detr_v2_tiny", tmp_path)))
    graph, parts = trace(detector, where="a"), FloatParts(detector)
    left = [set(parts.nodes_in(graph, level)) for level in LEVELS]
    assert all(fewer < more for fewer, more in itertools.pairwise(left))
    layers = [node for node in nodes_of(graph) if node.kind in LAYERS]
    modules = [{node.module for node in layers if node.name not in nodes} for nodes in left]
    own, decoder = "model.decoder.layers.0", "model.decoder.layers.0.encoder_attn"
    assert f"{own}.mlp.fc1" in modules[1] and f"{own}.mlp.fc1" not in modules[2]
    assert f"{decoder}.value_proj" in modules[0] and f"{decoder}.sampling_offsets" not in modules[0]
    heads = {"model.enc_score_head", "model.enc_bbox_head.layers.0", "model.decoder.class_embed.1"}
    assert heads <= modules[0] and not heads & modules[1]
    assert "model.encoder.aifi.0.layers.0.mlp.fc1" in modules[2]
    assert modules[3] and all(module.startswith("model.backbone.") for module in modules[3])
    convolutions = sum(node.kind == "Convolution" for node in layers if node.name not in left[3])
    assert convolutions == len(layers) - len(left[3] & {node.name for node in layers})


@pytest.fixture(scope="module")
def sensible(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A checkpoint and an images table whose labels are what it finds, so that its AP is high."""
    folder = tmp_path_factory.mktemp("int8")
    checkpoint, table = tiny("rt_detr_v2_tiny", folder / "checkpoint"), folder / "truth"
    drawn = [np.roll(image, shift, axis=1) for image in pictures([(96, 96), (120, 90)] * 6) for shift in (0, 29)]
    images = [decode(encode(image), max_pixels=10**6) for image in drawn]
    rows = []
    for number, (image, found) in enumerate(zip(images, found_by(checkpoint, images), strict=True)):
        boxes = found.boxes_xywh[:8].clip(0.0)
        objects = {
            "id": list(range(8 * number + 1, 8 * number + 1 + len(boxes))),
            "bbox": boxes.tolist(),
            "category": found.categories[:8].tolist(),
            "area": boxes[:, 2:].prod(axis=1).tolist(),
            "iscrowd": [False] * len(boxes),
        }
        content = {"bytes": encode(image), "path": f"{number}.jpg"}
        size = {"width": image.shape[1], "height": image.shape[0]}
        rows.append({"image_id": number, "image": content, **size, "objects": objects})
    with TableWriter(str(table), build_schema("images", CATEGORIES), config_hash="x") as writer:
        writer.write_rows(rows)
    return str(checkpoint), str(table)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("one_thread")
def test_int8_with_its_proof(sensible: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, table = sensible
    options: dict[str, Any] = {"checkpoint": checkpoint, "int8": True, "calibration": table, "truth": table}
    options |= {"bootstrap": 100}
    # A model as small as this one gains nothing.
    for module in (proofs, trials):
        monkeypatch.setattr(module, "MIN_SPEEDUP", 0.0)
    refused = raydet.export_openvino(**options, out=str(tmp_path / "refused"), max_ap_drop=1e-9)
    assert refused.out is None and refused.exit_code == 1 and refused.int8 is not None
    assert not any(tmp_path.iterdir())
    assert "nothing was written" in refused.lines()[-1]
    assert all(own.ap is not None and own.low is not None for own in refused.int8.trials)
    report = raydet.export_openvino(**options, out=str(tmp_path / "graph"), max_ap_drop=0.9)
    values, own = check_result(report, "export openvino"), report.int8
    assert report.exit_code == 0 and own is not None and own.taken is not None and own.ap_float > 0.5
    assert [each.level for each in own.trials][:: len(own.floats)] == list(LEVELS)
    taken = own.trials[own.taken]
    assert taken.ap is not None and taken.ap > 0.05 and len(own.float_layers) == taken.num_float
    assert taken.speedup == max(each.speedup for each in own.trials)
    record = json.loads((tmp_path / "graph" / "raydet.json").read_text())["openvino"]
    assert record["int8"] == values["int8"]
    scoring: dict[str, Any] = {"engine": "openvino", "precision": taken.precision, "data": table}
    found = raydet.predict(checkpoint=str(tmp_path / "graph"), out=str(tmp_path / "found"), **scoring)
    measured = raydet.evaluate(truth=table, detections=found.out).result
    assert measured.num_images == own.num_images
    assert abs((measured.AP or 0.0) - taken.ap) < 1e-6


@pytest.mark.usefixtures("one_thread")
def test_classes_that_the_model_lacks_are_refused(sensible: tuple[str, str], tmp_path: Path) -> None:
    checkpoint, table = sensible
    other = unlabelled(tmp_path / "other", (Category(0, "tree"),))
    with pytest.raises(UserError, match=r"other has none of the classes of .*: cat, dog, toothbrush"):
        raydet.export_openvino(
            checkpoint=checkpoint, out=str(tmp_path / "a"), int8=True, calibration=table, truth=other
        )


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_an_ap_of_zero_proves_nothing(sensible: tuple[str, str], tmp_path: Path) -> None:
    checkpoint, table = sensible
    truth = unlabelled(tmp_path / "truth", CATEGORIES)
    with pytest.raises(UserError, match=r"AP of .* is 0"):
        raydet.export_openvino(
            checkpoint=checkpoint, out=str(tmp_path / "a"), int8=True, calibration=table, truth=truth
        )
    assert not (tmp_path / "a").exists()


def unlabelled(uri: Path, categories: Sequence[Category]) -> str:
    """Write an images table with one image and no box."""
    objects: dict[str, list[Any]] = {name: [] for name in ("id", "bbox", "category", "area", "iscrowd")}
    image = {"bytes": encode(pictures([(96, 96)])[0]), "path": "a.jpg"}
    with TableWriter(str(uri), build_schema("images", categories), config_hash="x") as writer:
        writer.write_rows([{"image_id": 1, "image": image, "width": 96, "height": 96, "objects": objects}])
    return str(uri)

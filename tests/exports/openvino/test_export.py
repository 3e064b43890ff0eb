"""An exported folder gives the boxes that torch gives, without a trace and without the checkpoint's weights."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import raydet
from raydet import UserError
from raydet.cli.main import main
from raydet.config import ExportOpenvinoConfig
from raydet.engines.openvino import engine
from raydet.exports.openvino.export import export_openvino
from raydet.measuring.fitting.operating_point import FittedPoint, read_point
from raydet.models.checkpoints import fingerprint
from raydet.models.loading import build_detector
from raydet.preparation.sources import shapes
from tests.engines.test_engines import CATEGORIES, SIZES_HW, TINY, assert_near, assert_same, found_by, pictures
from tests.engines.test_engines import tiny as tiny_model
from tests.json_output import check_result
from tests.small_sets import write_drawn

FILES = ["config.json", "model.bin", "model.xml", "preprocessor_config.json", "raydet.json"]
FEW = {"detr_tiny", "yolos_tiny"}


def exported(name: str, folder: Path, **options: Any) -> Path:
    """Export a tiny model, and delete its checkpoint."""
    checkpoint, out = tiny_model(name, folder / "checkpoint"), folder / "graph"
    export_openvino(ExportOpenvinoConfig(checkpoint=str(checkpoint), out=str(out), **options))
    return out


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in FEW else pytest.mark.slow) for name in TINY])
def test_the_graph_finds_what_torch_finds(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, out, images = tiny_model(name, tmp_path / "checkpoint"), tmp_path / "graph", pictures(SIZES_HW)
    report = export_openvino(ExportOpenvinoConfig(checkpoint=str(checkpoint), out=str(out)))
    assert check_result(report, "export openvino")["max_difference"] < 1e-4 and report.exit_code == 0
    assert sorted(path.name for path in out.iterdir()) == FILES
    assert report.num_bytes == sum((out / name).stat().st_size for name in FILES[1:3])
    assert report.image_size_hw == (96, 96) and report.images_per_run == (1 if "table" in name else 4)
    expected = found_by(checkpoint, images)
    shutil.rmtree(checkpoint)
    monkeypatch.setattr(engine, "trace", None)
    assert_same(found_by(out, images, engine="openvino"), expected)
    if name == "yolos_tiny":
        assert_near(found_by(out, images, engine="openvino", precision="bf16"), expected)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_pixels_in_and_boxes_out(tmp_path: Path) -> None:
    checkpoint, out = str(tmp_path / "checkpoint"), tmp_path / "graph"
    detector = build_detector("detr_tiny", shapes.CATEGORIES, image_size=96, seed=0)
    model: Any = detector.model
    with torch.no_grad():
        model.class_labels_classifier.bias[1] = 2.0  # scores above those that the receipt compares
    detector.save(checkpoint)
    data = write_drawn(tmp_path / "data", [(pixels, [[5.0, 5.0, 40.0, 30.0]], [1]) for pixels in pictures(SIZES_HW)])
    report = raydet.export_openvino(checkpoint=checkpoint, out=str(out), pixels_in=True, check_data=data)
    assert sorted(path.name for path in out.iterdir()) == sorted([*FILES, "pixels_in.bin", "pixels_in.xml"])
    receipt = report.receipt
    assert receipt is not None and receipt.num_compared > 0 and receipt.num_without_partner == 0
    assert receipt.share_within_half_px == 1.0
    assert receipt.ap_graph == pytest.approx(receipt.ap_checkpoint, abs=1e-3)
    raydet.load(out, engine="openvino")


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_sizes_that_vary_and_half_the_bytes(tmp_path: Path) -> None:
    checkpoint = tiny_model("conditional_detr_tiny", tmp_path / "checkpoint", pads_to_largest=True)
    images, sizes = pictures(SIZES_HW), []
    for fp16_weights in (False, True):
        out = tmp_path / f"graph-{fp16_weights}"
        report = raydet.export_openvino(checkpoint=str(checkpoint), out=str(out), fp16_weights=fp16_weights)
        assert report.image_size_hw is None and "any height and width" in report.lines()[1]
        assert report.input_names == ("pixel_values", "pixel_mask")
        tolerance = {"score": 1e-2, "box_px": 1.0} if fp16_weights else {}
        assert_same(found_by(out, images, engine="openvino"), found_by(checkpoint, images), **tolerance)
        sizes.append((out / "model.bin").stat().st_size)
    assert sizes[1] < 0.6 * sizes[0]


@pytest.mark.usefixtures("one_thread")
def test_the_receipt_and_predict_in_one_process(tmp_path: Path) -> None:
    checkpoint, out = str(tmp_path / "checkpoint"), str(tmp_path / "graph")
    build_detector("rf_detr_tiny", shapes.CATEGORIES, image_size=96, seed=0).save(checkpoint)
    data = write_drawn(tmp_path / "data", [(pixels, [[5.0, 5.0, 40.0, 30.0]], [1]) for pixels in pictures(SIZES_HW)])
    report = raydet.export_openvino(checkpoint=checkpoint, out=out, check_data=data)
    assert report.receipt is not None and report.receipt.num_images == len(SIZES_HW)
    assert report.receipt.ap_graph == pytest.approx(report.receipt.ap_checkpoint)
    record = json.loads(Path(out, "raydet.json").read_text())["openvino"]
    assert record["checkpoint"] == checkpoint and record["receipt"]["num_images"] == len(SIZES_HW)
    tables = []
    runs: list[tuple[str, Any]] = [(checkpoint, "torch"), (out, "openvino")]
    for folder, name in runs:
        result = raydet.predict(checkpoint=folder, engine=name, data=data, out=str(tmp_path / name))
        tables.append(raydet.open_table(result.out, "detections").read().to_pylist())
    for mine, theirs in zip(*tables, strict=True):
        assert mine["detections"]["score"] == pytest.approx(theirs["detections"]["score"], abs=1e-4)


@pytest.mark.usefixtures("one_thread")
def test_mistakes_are_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = exported("yolos_tiny", tmp_path)
    data, found = write_drawn(tmp_path / "data", [(pictures([(96, 96)])[0], [], [])]), str(tmp_path / "found")
    for arguments in (
        ["predict", "--engine", "torch", "--checkpoint", str(out), "--data", data, "--out", found],
        ["predict", "--engine", "onnx", "--checkpoint", str(out), "--data", data, "--out", found],
        ["export", "onnx", "--checkpoint", str(out), "--out", str(tmp_path / "a.onnx")],
        ["export", "openvino", "--checkpoint", str(out), "--out", found],
        ["train", "--model", str(out), "--train-data", data, "--val-data", data, "--out", found],
    ):
        assert main(arguments) == 2
        assert "holds an OpenVINO graph without weights" in capsys.readouterr().err
    assert main(["export", "openvino", "--checkpoint", str(tmp_path / "checkpoint"), "--out", str(out)]) == 2
    assert "already contains files" in capsys.readouterr().err
    assert not Path(found).exists()
    config = json.loads((out / "config.json").read_text())
    damages: dict[str, Any] = {
        "does not fit": ("config.json", json.dumps(config | {"num_detection_tokens": 7})),
        "cannot read the graph": ("model.xml", "<net"),
    }
    for message, (name, content) in damages.items():
        (out / name).write_text(content)
        with pytest.raises(UserError, match=message):
            raydet.load(out, engine="openvino")
    (out / "model.xml").unlink()
    with pytest.raises(UserError, match="no model weights"):
        raydet.predict(checkpoint=str(out), engine="openvino", data=data, out=found)


def test_options_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"int8": True, "truth": "t"}, "--int8 needs --calibration"),
        ({"int8": True, "calibration": "t"}, "--int8 needs --truth"),
        ({"truth": "t"}, "--truth needs --int8"),
        ({"max_ap_drop": 0.0}, "--max-ap-drop"),
        ({"calibration_images": 0}, "--calibration-images"),
        ({"int8": True, "truth": "t", "calibration": "t", "pixels_in": True}, "omit it with --int8"),
        ({"int8": True, "truth": "t", "calibration": "t", "fp16_weights": True}, "omit it with --int8"),
        ({"int8": True, "truth": "t", "calibration": "t", "check_data": "t"}, "--int8 measures AP on --truth"),
    ]
    for options, message in wrong:
        with pytest.raises(UserError, match=message):
            ExportOpenvinoConfig(checkpoint="a", out="b", **options)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "nncf" else True)
    with pytest.raises(UserError, match=r'pip install "raydet\[int8\]"'):
        raydet.export_openvino(checkpoint="a", out="b", int8=True, calibration="t", truth="t")


@pytest.mark.usefixtures("one_thread")
def test_fit_keeps_the_record_and_belongs_to_the_graph(tmp_path: Path) -> None:
    out = exported("yolos_tiny", tmp_path)
    names = [category.name for category in CATEGORIES]
    with pytest.raises(UserError, match="has no operating point"):
        read_point(str(out), names)
    point = FittedPoint(
        classes=tuple(names),
        thresholds=(0.5,) * 3,
        maps=(None,) * 3,
        class_agnostic_nms=None,
        target_precision=None,
        model_fingerprint=fingerprint(str(out)),
    )
    point.write(str(out))
    assert read_point(str(out), names) == point
    assert json.loads((out / "raydet.json").read_text())["openvino"]["images_per_run"] == 4
    raydet.load(out, engine="openvino", operating_point=True)
    with (out / "model.bin").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(UserError, match="has changed since"):
        read_point(str(out), names)

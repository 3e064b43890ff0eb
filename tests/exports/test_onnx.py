"""An ONNX file matches torch, holds the metadata for pre- and post-processing, and is written atomically."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from raydet.common.errors import RunError
from raydet.config import ExportOnnxConfig
from raydet.exports.onnx import export_onnx
from raydet.models.graph import example_inputs
from raydet.models.loading import build_detector, load_detector
from raydet.models.onnx import OPSET
from raydet.tables.schema import Category
from tests.json_output import check_result

CATEGORIES = (Category(3, "cat"), Category(7, "dog"), Category(90, "toothbrush"))


def save(name: str, folder: Path) -> str:
    build_detector(name, CATEGORIES, image_size=96, seed=0).save(str(folder))
    return str(folder)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("name", "names"), [("detr_tiny", ("pixel_values", "pixel_mask")), ("rf_detr_tiny", ("pixel_values",))]
)
def test_file_says_what_torch_says(name: str, names: tuple[str, ...], tmp_path: Path) -> None:
    folder, path = save(name, tmp_path / "model"), tmp_path / "new" / "model.onnx"
    report = export_onnx(ExportOnnxConfig(checkpoint=folder, out=str(path)))
    assert check_result(report, "export onnx")["num_bytes"] == path.stat().st_size
    assert report.input_names == names
    assert report.image_size_hw == (96, 96)
    assert report.max_difference is not None and report.max_difference < 1e-4
    assert report.num_bytes == path.stat().st_size
    assert [item.name for item in path.parent.iterdir()] == ["model.onnx"]
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert model.opset_import[0].version == report.opset == OPSET
    metadata = {item.key: item.value for item in model.metadata_props}
    assert json.loads(metadata["categories"]) == [{"id": item.id, "name": item.name} for item in CATEGORIES]
    assert json.loads(metadata["image_size_hw"]) == [96, 96]
    assert json.loads(metadata["image_mean"]) == pytest.approx([0.485, 0.456, 0.406])
    assert metadata["raydet_version"]
    detector = load_detector(folder)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [item.name for item in session.get_inputs()] == list(names)
    inputs = example_inputs(detector, 5, seed=7)
    logits, boxes = session.run(
        ["logits", "pred_boxes"], {key: value.numpy() for key, value in zip(names, inputs, strict=True)}
    )
    with torch.inference_mode():
        expected = detector.model(**dict(zip(names, inputs, strict=True)))
    np.testing.assert_allclose(logits, expected.logits.numpy(), atol=1e-4)
    np.testing.assert_allclose(boxes, expected.pred_boxes.numpy(), atol=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_another_image_size(tmp_path: Path) -> None:
    report = export_onnx(
        ExportOnnxConfig(
            checkpoint=save("rt_detr_v2_tiny", tmp_path / "model"), out=str(tmp_path / "a.onnx"), image_size=128
        )
    )
    assert report.image_size_hw == (128, 128)
    session = onnxruntime.InferenceSession(str(tmp_path / "a.onnx"), providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape[1:] == [3, 128, 128]
    assert "128×128" in report.lines()[1]


@pytest.mark.usefixtures("one_thread")
def test_any_size_where_the_processor_makes_many(tmp_path: Path) -> None:
    folder = save("yolos_tiny", tmp_path)
    path = tmp_path / "preprocessor_config.json"
    changes = {"size": {"shortest_edge": 64, "longest_edge": 112}, "pad_size": None}
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    report = export_onnx(ExportOnnxConfig(checkpoint=folder, out=str(tmp_path / "a.onnx")))
    assert report.image_size_hw is None
    assert "any height and width" in report.lines()[1]
    pixels = torch.randn(2, 3, 64, 112)
    session = onnxruntime.InferenceSession(str(tmp_path / "a.onnx"), providers=["CPUExecutionProvider"])
    [boxes] = session.run(["pred_boxes"], {"pixel_values": pixels.numpy()})
    with torch.inference_mode():
        expected = load_detector(folder).model(pixel_values=pixels).pred_boxes
    np.testing.assert_allclose(boxes, expected.numpy(), atol=1e-4)


@pytest.mark.usefixtures("one_thread")
def test_a_graph_that_says_something_else_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, out = save("yolos_tiny", tmp_path / "model"), tmp_path / "a.onnx"
    other = build_detector("yolos_tiny", CATEGORIES, image_size=96, seed=1)
    other.model.eval()
    from raydet.exports import onnx as module
    from raydet.models.onnx import to_onnx

    wrong = to_onnx(other, where="other", remedy="")
    monkeypatch.setattr(module, "to_onnx", lambda *_, **__: wrong)
    with pytest.raises(RunError, match=r"differs from torch by .*1e-03"):
        export_onnx(ExportOnnxConfig(checkpoint=folder, out=str(out)))
    assert not out.exists()


def test_mistakes_are_one_clear_line(tmp_path: Path) -> None:
    folder = save("rt_detr_v2_tiny", tmp_path / "model")
    for options, message in (
        ({"out": str(tmp_path / "model.pt")}, r"\.onnx.*model\.pt"),
        ({"image_size": 100}, "--image-size .*32"),
        ({"image_size": 0}, "--image-size .*0"),
        ({"checkpoint": str(tmp_path)}, "config.json"),
    ):
        arguments: dict[str, Any] = {"checkpoint": folder, "out": str(tmp_path / "a.onnx"), **options}
        with pytest.raises(ValueError, match=message):
            export_onnx(ExportOnnxConfig(**arguments))
    assert not (tmp_path / "a.onnx").exists()

"""A graph with pixels in gives the boxes that torch gives, and its resize is that of the image processor."""

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from PIL import Image

import raydet
from raydet import UserError
from raydet.common.boxes import xywh_to_xyxy
from raydet.config import ExportOnnxConfig
from raydet.exports.onnx import export_onnx
from raydet.exports.pixels_in import DETECTIONS, PIXELS, with_pixels_in
from raydet.models.detector import Detector
from raydet.models.geometry import ResizeRule, resized_planes
from raydet.models.loading import build_detector, load_detector
from raydet.models.onnx import open_session, to_onnx
from raydet.preparation.sources import shapes
from raydet.tables.schema import Category
from tests.small_sets import write_drawn

CATEGORIES = (Category(3, "cat"), Category(7, "dog"), Category(90, "toothbrush"))
RULES = {
    "fixed": ResizeRule(mode="fixed", size_hw=(64, 96), pad_to_hw=(80, 96)),
    "edges": ResizeRule(mode="keep_aspect", shortest=64, longest=112),
    "multiples": ResizeRule(mode="keep_aspect", shortest=64, longest=112, resample=3, multiple_of=16),
    "limit": ResizeRule(mode="keep_aspect", limit_hw=(100, 120), pad_to_hw=(100, 120)),
}


def drawn(random: np.random.Generator, size_hw: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """Draw a smooth picture."""
    coarse = Image.fromarray(random.integers(0, 256, (7, 9, 3), dtype=np.uint8))
    return np.array(coarse.resize(size_hw[::-1], Image.Resampling.BICUBIC))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", ["rf_detr_tiny", "detr_tiny"])
def test_boxes_are_those_of_torch(name: str, tmp_path: Path) -> None:
    folder, path = str(tmp_path / "model"), tmp_path / "model.onnx"
    build_detector(name, CATEGORIES, image_size=96, seed=0).save(folder)
    report = export_onnx(ExportOnnxConfig(checkpoint=folder, out=str(path), pixels_in=True))
    assert report.input_names == (PIXELS,) and report.opset == 18 and "boxes_xyxy" in report.lines()[1]
    onnx.checker.check_model(onnx.load(path), full_check=True)
    session, model = open_session(path.read_bytes(), num_threads=1), raydet.load(folder, score_threshold=0.0)
    random = np.random.default_rng(0)
    pictures = [drawn(random, (96, 96)) for _ in range(3)]  # not resized: a random model answers to a single level
    boxes, scores, labels = session.run(DETECTIONS, {PIXELS: np.stack(pictures)})
    for number, found in enumerate(model(pictures)):
        assert len(found.scores) > 3
        kept = slice(len(found.scores))
        np.testing.assert_allclose(scores[number][kept], found.scores, atol=1e-4)
        np.testing.assert_allclose(boxes[number][kept], xywh_to_xyxy(found.boxes_xywh), atol=1e-2)
        np.testing.assert_array_equal(labels[number][kept], found.class_indices)


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Detector, bytes]:
    """A detector with a pixel mask, and its graph."""
    folder = str(tmp_path_factory.mktemp("detr"))
    build_detector("detr_tiny", CATEGORIES, image_size=96, seed=0).save(folder)
    detector = load_detector(folder)
    return detector, to_onnx(detector, where=folder, remedy="")


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", RULES)
def test_the_resize_is_that_of_the_image_processor(
    name: str, padded: tuple[Detector, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    detector, core = padded
    rule = RULES[name]
    monkeypatch.setattr(detector, "resize_rule", rule)
    graph = with_pixels_in(core, detector)
    names = ["pixel_values", "pixel_mask"]
    # The inputs of the model become outputs of the graph; the model itself does not run.
    for inner in names:
        graph.graph.output.append(onnx.helper.make_empty_tensor_value_info(inner))
    session = open_session(graph.SerializeToString(), num_threads=1)
    random = np.random.default_rng(1)
    mean, std = (np.array(values)[:, None, None] for values in detector.mean_and_std())
    for size_hw in [(300, 200), (48, 64), (97, 96), (60, 200), (333, 31), (64, 64), (1, 50)]:
        picture = drawn(random, size_hw)
        values, mask = (array[0] for array in session.run(names, {PIXELS: picture[None]}))
        height, width = rule.target_size_hw(size_hw)
        expected = resized_planes(picture, (height, width), rule.resample).astype(np.float64)
        difference = np.abs((values * std + mean)[:, :height, :width] - expected)
        assert difference.max() < 2.5 and (difference > 0.5).mean() < 0.08, size_hw
        assert values.shape[1:] == mask.shape == (rule.pad_to_hw or (height, width))
        assert not values[:, height:].any() and not values[:, :, width:].any()
        assert mask.sum() == height * width and mask[:height, :width].all()


@pytest.mark.usefixtures("one_thread")
def test_the_receipt_compares_with_torch_on_labelled_images(tmp_path: Path) -> None:
    folder, path = str(tmp_path / "model"), tmp_path / "model.onnx"
    build_detector("rf_detr_tiny", shapes.CATEGORIES, image_size=96, seed=0).save(folder)
    random = np.random.default_rng(0)
    rows = [(drawn(random, (96, 96)), [[5.0, 5.0, 40.0, 30.0]], [1]) for _ in range(3)]
    data = write_drawn(tmp_path / "data", rows)
    report = export_onnx(ExportOnnxConfig(checkpoint=folder, out=str(path), pixels_in=True, check_data=data))
    assert report.receipt is not None
    assert report.receipt.num_images == 3 and report.receipt.ap_graph == pytest.approx(report.receipt.ap_checkpoint)
    content = json.loads((tmp_path / "model.receipt.json").read_text())
    assert content["num_images"] == 3 and content["checkpoint"] == folder
    assert "AP on 3 images" in report.lines()[3]


def test_options_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match="--check-data needs --pixels-in"):
        ExportOnnxConfig(checkpoint="a", out="b.onnx", check_data="c")
    with pytest.raises(UserError, match="omit --image-size"):
        ExportOnnxConfig(checkpoint="a", out="b.onnx", pixels_in=True, check_data="c", image_size=64)

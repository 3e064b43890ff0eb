"""All engines against torch in full precision, on images of any size."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import nn

import raydet
from raydet.common.boxes import xywh_to_xyxy
from raydet.common.errors import UserError
from raydet.config import PredictConfig
from raydet.engines.engine import check_engine
from raydet.engines.loading import load_engine
from raydet.engines.openvino.graph import compile_graph, trace
from raydet.engines.openvino.sampling import samplings_of
from raydet.engines.torch_engine import TorchEngine
from raydet.models.detector import Detections
from raydet.models.geometry import Image
from raydet.models.graph import example_inputs, input_names
from raydet.models.loading import build_detector, load_detector
from raydet.models.onnx import execution_providers
from raydet.models.small import SMALL_MODELS
from raydet.tables.schema import Category

CATEGORIES = (Category(3, "cat"), Category(7, "dog"), Category(90, "toothbrush"))
TINY = sorted(set(SMALL_MODELS) - {"rt_detr_v2_small"})
QUICK = {"rt_detr_v2_tiny", "detr_tiny", "conditional_detr_tiny", "lw_detr_tiny", "yolos_tiny"}
"""One model of each kind; tracing the others would double the time."""
SIZES_HW = [(120, 160), (90, 90), (160, 70), (120, 160), (96, 128)]


def tiny(name: str, folder: Path, *, pads_to_largest: bool = False) -> Path:
    """A saved model whose outputs depend on the image, unlike those of an untrained one."""
    detector = build_detector(name, CATEGORIES, image_size=96, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in detector.model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        for module in detector.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
        (part,) = TorchEngine(detector).prepare(pictures([(96, 96)] * 4))
        detector.model.train()(**detector.model_inputs(part.batch))
    detector.model.eval()
    detector.save(str(folder))
    if pads_to_largest:
        path = folder / "preprocessor_config.json"
        changes = {"size": {"shortest_edge": 64, "longest_edge": 112}, "pad_size": None}
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def pictures(sizes_hw: Sequence[tuple[int, int]]) -> list[Image]:
    generator = np.random.default_rng(0)
    return [
        generator.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
        .repeat(8, axis=0)
        .repeat(8, axis=1)[:height, :width]
        for height, width in sizes_hw
    ]


def config_of(folder: Path | str, **options: Any) -> PredictConfig:
    return PredictConfig(checkpoint=str(folder), data="images", out="out", **options)


def found_by(folder: Path, images: Sequence[Image], **options: Any) -> list[Detections]:
    engine = load_engine(config_of(folder, **options), device="cpu", num_threads=1)
    return engine.start(engine.prepare(images))()


def assert_same(
    found: Sequence[Detections], expected: Sequence[Detections], *, score: float = 1e-4, box_px: float = 0.05
) -> None:
    """Check that detections match one to one; rounding may swap two detections with almost equal scores."""
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        assert len(mine.scores) == len(theirs.scores) > 0
        assert (np.diff(mine.scores) <= 0).all()
        between = np.abs(xywh_to_xyxy(mine.boxes_xywh)[:, None] - xywh_to_xyxy(theirs.boxes_xywh)).max(axis=2)
        is_same = (np.abs(mine.scores[:, None] - theirs.scores) <= score) & (between <= box_px)
        is_same &= mine.categories[:, None] == theirs.categories
        pairs = linear_sum_assignment(is_same, maximize=True)
        assert is_same[pairs].all()
    # Results must differ between images, otherwise mixed-up images would pass.
    assert len({tuple(item.scores) for item in expected}) > 1


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in TINY])
def test_all_engines_find_what_torch_finds(name: str, tmp_path: Path) -> None:
    folder, images = tiny(name, tmp_path), pictures(SIZES_HW)
    expected = found_by(folder, images, engine="torch")  # equal to plain transformers: tests/models/test_models.py
    for engine in ("openvino", "onnx"):
        assert_same(found_by(folder, images, engine=engine), expected)


@pytest.mark.parametrize("engine", ["torch", "openvino", "onnx"])
@pytest.mark.parametrize(
    "name", ["conditional_detr_tiny", "yolos_tiny", pytest.param("dab_detr_tiny", marks=pytest.mark.slow)]
)
def test_sizes_that_vary(name: str, engine: Any, tmp_path: Path) -> None:
    folder, images = tiny(name, tmp_path, pads_to_largest=True), pictures(SIZES_HW)
    alone = [found for image in images for found in found_by(folder, [image], pad_batches=False)]
    assert_same(found_by(folder, images, engine=engine, pad_batches=False), alone)
    together = found_by(folder, images, engine=engine, pad_batches=True)
    assert_same(together, found_by(folder, images, engine="torch", pad_batches=True))
    # For any batching of the images.
    one_by_one = [found_by_one for image in images[:2] for found_by_one in found_by(folder, [image], engine="torch")]
    assert_same(together[:2], one_by_one)


@pytest.mark.parametrize(
    ("name", "pads_to_largest"), [("detr_tiny", False), ("conditional_detr_tiny", True), ("yolos_tiny", True)]
)
def test_the_device_resizes_into_the_same_batches(name: str, pads_to_largest: bool, tmp_path: Path) -> None:
    folder, images = tiny(name, tmp_path, pads_to_largest=pads_to_largest), pictures(SIZES_HW)
    engines: list[Any] = [
        load_engine(config_of(folder, resize_on=place), device="cpu", num_threads=1) for place in ("cpu", "device")
    ]
    here, there = (engine.prepare(images) for engine in engines)
    for mine, theirs in zip(there, here, strict=True):
        assert (mine.places, mine.batch.sizes_hw) == (theirs.places, theirs.batch.sizes_hw)
        assert mine.batch.original_sizes_hw == theirs.batch.original_sizes_hw
        assert mine.batch.pixels.dtype == torch.uint8
        assert int((mine.batch.pixels.int() - theirs.batch.pixels.int()).abs().max()) == 1
        for pixels, (height, width) in zip(mine.batch.pixels, mine.batch.sizes_hw, strict=True):
            assert not pixels[:, height:].any() and not pixels[:, :, width:].any()
    assert_same(engines[1].predict(there), engines[0].predict(here), score=1e-3, box_px=0.1)


def test_padded_images_are_told_from_their_padding(tmp_path: Path) -> None:
    """Check that a box around the complete input is the complete original image, for any padding."""
    detector = build_detector("detr_tiny", CATEGORIES, image_size=96, seed=0)
    model: Any = detector.model
    head = model.bbox_predictor.layers[-1]
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(torch.logit(torch.tensor([0.5, 0.5, 1 - 1e-6, 1 - 1e-6])))
    detector.save(str(tmp_path))
    path = tmp_path / "preprocessor_config.json"
    path.write_text(
        json.dumps(
            json.loads(path.read_text()) | {"size": {"shortest_edge": 64, "longest_edge": 112}, "pad_size": None}
        )
    )
    engine = load_engine(config_of(tmp_path), device="cpu", num_threads=1)
    images = pictures(SIZES_HW)
    parts: Any = engine.prepare(images)
    assert sorted(place for part in parts for place in part.places) == list(range(len(images)))
    assert {tuple(part.batch.pixels.shape[-2:]) for part in parts} == {(64, 88), (64, 64), (112, 52)}
    inputs = load_detector(str(tmp_path)).model_inputs(parts[0].batch)
    assert engine.input_size_hw((120, 160)) == parts[0].batch.sizes_hw[0] == (64, 85)
    assert inputs["pixel_mask"][0, :, :85].all() and not inputs["pixel_mask"][0, :, 85:].any()
    assert not inputs["pixel_values"][0, :, :, 85:].any()
    for image, found in zip(images, engine.start(parts)(), strict=True):
        whole = np.tile([0.0, 0.0, image.shape[1], image.shape[0]], (len(found.scores), 1))
        np.testing.assert_allclose(found.boxes_xywh, whole, atol=0.01)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_live_model_is_run_as_it_is_and_left_as_it_was(precision: Any, tmp_path: Path) -> None:
    folder, images = tiny("conditional_detr_tiny", tmp_path), pictures(SIZES_HW)
    detector = load_detector(str(folder))
    detector.model.train()
    engine = TorchEngine(detector, precision=precision)
    forwards = {name: vars(module).get("forward") for name, module in detector.model.named_modules()}
    threads = torch.get_num_threads()
    found = engine.predict(engine.prepare(images))
    assert_same(found, found_by(folder, images, precision=precision, channels_last=False), score=0, box_px=0)
    assert all(module.training for module in detector.model.modules())
    assert {name: vars(module).get("forward") for name, module in detector.model.named_modules()} == forwards
    assert torch.get_num_threads() == threads
    with torch.no_grad():  # the engine must use the current weights
        next(parameter for name, parameter in detector.model.named_parameters() if "class_labels" in name).mul_(3)
    assert not np.array_equal(engine.predict(engine.prepare(images))[0].scores, found[0].scores)


@pytest.mark.parametrize("name", ["detr_tiny", "yolos_tiny", "conditional_detr_tiny"])
def test_bf16_of_torch(name: str, tmp_path: Path) -> None:
    folder, images = tiny(name, tmp_path), pictures(SIZES_HW)
    exact, close = found_by(folder, images), found_by(folder, images, precision="bf16", channels_last=True)
    assert_near(close, exact)


def test_bf16_of_openvino(tmp_path: Path) -> None:
    folder, images = tiny("yolos_tiny", tmp_path), pictures(SIZES_HW)
    assert_near(found_by(folder, images, engine="openvino", precision="bf16"), found_by(folder, images))


def assert_near(close: Sequence[Detections], exact: Sequence[Detections]) -> None:
    """Check that results are close, as far as eight bits allow, and not equal, which proves the lower precision."""
    for mine, theirs in zip(close, exact, strict=True):
        assert len(mine.scores) == len(theirs.scores)
        np.testing.assert_allclose(mine.scores[:5], theirs.scores[:5], atol=0.05)
        assert not np.array_equal(mine.scores, theirs.scores)


def test_boxes_leave_autocast_in_full_precision(tmp_path: Path) -> None:
    folder, images = tiny("detr_tiny", tmp_path), pictures([(160, 160)])
    [found] = found_by(folder, images, precision="bf16")
    centres = (found.boxes_xywh[:, :2] + found.boxes_xywh[:, 2:] / 2) / 160
    as_bf16 = torch.from_numpy(centres).bfloat16().double().numpy()
    assert np.abs(centres - as_bf16).max() > 1e-5


def test_channels_last_changes_nothing(tmp_path: Path) -> None:
    folder, images = tiny("rt_detr_v2_tiny", tmp_path), pictures(SIZES_HW)
    assert_same(found_by(folder, images, channels_last=True), found_by(folder, images))


def test_pictures_may_be_views_that_cannot_be_written_to(tmp_path: Path) -> None:
    folder, images = tiny("yolos_tiny", tmp_path), pictures([(96, 96), (120, 80)])
    expected = found_by(folder, images)
    mirrored = [np.ascontiguousarray(image[:, ::-1])[:, ::-1] for image in images]
    for image in mirrored:
        image.flags.writeable = False
    assert_same(found_by(folder, mirrored), expected)


def test_what_an_engine_says_of_its_model(tmp_path: Path) -> None:
    folder = tiny("yolos_tiny", tmp_path)
    for name in ("torch", "openvino", "onnx"):
        engine = load_engine(config_of(folder, engine=name), device="cpu", num_threads=1)
        assert engine.categories == CATEGORIES
        assert engine.max_detections == 20
        assert engine.input_size_hw((300, 200)) == (96, 64)
        assert engine.start(engine.prepare([]))() == []


@pytest.mark.parametrize("options", [{}, {"engine": "openvino"}])
def test_fp16_on_the_cpu_is_refused(options: Any, tmp_path: Path) -> None:
    config = config_of("nowhere", precision="fp16", **options)
    with pytest.raises(UserError, match=r"--precision fp16.*bf16"):
        check_engine(PredictConfig(**{**vars(config), "use_gpu": False}), "detr")
    folder = tiny("yolos_tiny", tmp_path)
    with pytest.raises(UserError, match=r"--precision fp16.*bf16"):
        load_engine(config_of(folder, precision="fp16", **options), device="cpu", num_threads=1)


def test_onnx_is_for_full_precision() -> None:
    with pytest.raises(UserError, match=r"--engine onnx.*bf16"):
        check_engine(config_of("nowhere", engine="onnx", precision="bf16"), "detr")


def test_a_gpu_comes_before_the_cpu_and_tensorrt_before_both_if_it_is_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def names(device: str) -> list[str]:
        chosen = execution_providers(listed, torch.device(device))
        return [one if isinstance(one, str) else one[0] for one in chosen]

    listed = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    assert names("cpu") == listed[2:]
    monkeypatch.setattr("raydet.models.onnx.find_spec", lambda name: None)
    assert execution_providers(listed, torch.device("cuda:1"))[0] == (listed[1], {"device_id": "1"})
    assert names("cuda") == listed[1:]
    monkeypatch.setattr("raydet.models.onnx.find_spec", lambda name: name)
    assert names("cuda") == listed


def test_a_gpu_needs_the_package_for_gpus(tmp_path: Path) -> None:
    config = config_of(tiny("detr_tiny", tmp_path), engine="onnx", use_gpu=True)
    with pytest.raises(UserError, match="replace onnxruntime with onnxruntime-gpu"):
        check_engine(config, "detr")
    with pytest.raises(UserError, match="replace onnxruntime with onnxruntime-gpu"):
        raydet.load(str(config.checkpoint), engine="onnx", use_gpu=True)


@pytest.mark.parametrize("engine", ["openvino", "onnx"])
def test_a_package_that_is_missing_is_named(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf'pip install "raydet\[{engine}\]"'):
        check_engine(config_of("nowhere", engine=engine), "detr")


@pytest.mark.parametrize("engine", ["openvino", "onnx"])
def test_deformable_detr_needs_one_size(engine: Any, tmp_path: Path) -> None:
    folder = tiny("deformable_detr_tiny", tmp_path)
    config = config_of(folder, engine=engine)
    check_engine(config, SMALL_MODELS["deformable_detr_tiny"].model_type)
    path = folder / "preprocessor_config.json"
    changes = {"size": {"shortest_edge": 64, "longest_edge": 112}, "pad_size": None}
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=r"deformable_detr.*--engine torch"):
        check_engine(config, "deformable_detr")
    path.unlink()  # As on the Hub, where the size is known only once the model is loaded.
    check_engine(config, "deformable_detr")
    with pytest.raises(UserError, match=r"deformable_detr.*--engine torch"):
        load_engine(config, device="cpu", num_threads=1)


@pytest.mark.parametrize(
    ("name", "num_layers"),
    [
        ("rt_detr_v2_tiny", 2),
        ("rt_detr_tiny", 2),
        ("d_fine_tiny", 3),
        ("deformable_detr_tiny", 4),
        ("lw_detr_tiny", 2),
    ],
)
def test_openvino_samples_with_the_queries_last(
    name: str, num_layers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = load_detector(str(tiny(name, tmp_path)))
    fast = trace(detector, where=name)
    monkeypatch.setattr("raydet.engines.openvino.graph.put_queries_last", lambda graph: None)
    plain = trace(detector, where=name)
    assert (len(list(samplings_of(plain))), len(list(samplings_of(fast)))) == (num_layers, 0)
    inputs = dict(zip(input_names(detector), example_inputs(detector, 4, seed=1), strict=True))
    found = [compile_graph(graph, precision="fp32", num_threads=1)(inputs) for graph in (plain, fast)]
    for port in range(2):
        np.testing.assert_allclose(found[0][port], found[1][port], rtol=1e-4, atol=1e-5)


def test_openvino_reports_to_nobody(tmp_path: Path) -> None:
    found_by(tiny("yolos_tiny", tmp_path), pictures([(96, 96)]), engine="openvino")
    assert sys.modules.get("openvino_telemetry") is None

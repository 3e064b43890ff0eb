"""A GPU against the CPU, without Ray: the gradient and the resize are the same, and each precision lowers the loss."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raydet.config import PredictConfig
from raydet.engines.engine import can_use_gpu
from raydet.engines.loading import load_engine
from raydet.engines.torch_engine import TorchEngine
from raydet.models.collate import collate
from raydet.models.detector import Detector
from raydet.models.loading import build_detector
from raydet.models.step import StepSetting, apply_gradients, compute_gradients
from raydet.tables.schema import Category
from tests.random_examples import random_examples

pytestmark = pytest.mark.gpu

CATEGORIES = (Category(1, "circle"), Category(2, "square"))
SIDE = 96


@pytest.fixture(autouse=True)
def exact_matrix_products() -> Iterator[None]:
    """Disable TensorFloat-32, whose ten mantissa bits are too few for a comparison with the CPU."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def _build(name: str, device: str) -> Detector:
    detector = build_detector(name, CATEGORIES, image_size=SIDE, seed=0, batch_norm="freeze")
    detector.model.config.num_denoising = 0
    module: Any
    for module in detector.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    detector.to(device).model.train()
    return detector


def _setting(device: str, dtype: torch.dtype | None = None) -> StepSetting:
    scaler = torch.amp.GradScaler("cuda") if dtype == torch.float16 else None
    return StepSetting(device=torch.device(device), autocast_dtype=dtype, world_size=1, scaler=scaler)


def _gradient(name: str, device: str) -> torch.Tensor:
    detector = _build(name, device)
    compute_gradients(detector, detector.model, [collate(random_examples(4, SIDE))], _setting(device))
    gradients = [p.grad.flatten().cpu().double() for p in detector.model.parameters() if p.grad is not None]
    return torch.cat(gradients)


@pytest.mark.parametrize("name", ["rt_detr_v2_tiny", "detr_tiny", "d_fine_tiny"])
def test_the_gradient_is_that_of_the_cpu(name: str) -> None:
    cpu, gpu = _gradient(name, "cpu"), _gradient(name, "cuda")
    assert float((cpu - gpu).norm() / cpu.norm()) <= 1e-3


@pytest.mark.parametrize("name", ["rt_detr_v2_tiny", "detr_tiny"])
def test_the_resize_is_that_of_the_cpu(name: str) -> None:
    generator = np.random.default_rng(0)
    sizes_hw = [(120, 160), (90, 90), (480, 640), (120, 160), (300, 70)]
    images = [generator.integers(0, 256, (*size_hw, 3), dtype=np.uint8) for size_hw in sizes_hw]
    cpu, gpu = (TorchEngine(_build(name, device), resize_on="device") for device in ("cpu", "cuda"))
    for _ in range(3):  # buffers are used again
        (expected,), (found,) = cpu.prepare(images), gpu.prepare(images)
        detections = gpu.predict([found])
        assert [len(one.scores) > 0 for one in detections] == [True] * len(images)
        assert (found.places, found.batch.sizes_hw) == (expected.places, expected.batch.sizes_hw)
        difference = found.batch.pixels.cpu().int() - expected.batch.pixels.int()
        assert int(difference.abs().max()) <= 1
        assert float(difference.ne(0).float().mean()) < 1e-3  # sums in another order round up instead of down


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, None], ids=["bf16", "fp16", "fp32"])
def test_steps_lower_the_loss(dtype: torch.dtype | None) -> None:
    detector, setting = _build("rt_detr_v2_tiny", "cuda"), _setting("cuda", dtype)
    optimizer = torch.optim.AdamW(detector.model.parameters(), 1e-3, fused=True)
    losses = []
    for _ in range(12):
        result = compute_gradients(detector, detector.model, [collate(random_examples(4, SIDE))], setting)
        apply_gradients(detector.model, optimizer, max_grad_norm=0.1, scaler=setting.scaler)
        losses.append(float(torch.stack(list(result.terms.values())).sum()))
    assert np.isfinite(losses).all() and losses[-1] < losses[0]


@pytest.mark.skipif(not can_use_gpu("onnx"), reason="onnxruntime-gpu is not installed")
def test_onnx_runtime_finds_what_torch_finds(tmp_path: Path) -> None:
    folder = str(tmp_path / "model")
    detector = _build("rt_detr_v2_tiny", "cpu")
    detector.model.eval()
    detector.save(folder)
    config = PredictConfig(checkpoint=folder, data="images", out="out", engine="onnx")
    images = [np.random.default_rng(0).integers(0, 256, (120, 160, 3), dtype=np.uint8) for _ in range(3)]
    found = []
    for engine in ("torch", "onnx"):
        loaded = load_engine(dataclasses.replace(config, engine=engine), device="cuda", num_threads=1)
        found.append(loaded.start(loaded.prepare(images))())
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one.scores, other.scores, atol=1e-4)

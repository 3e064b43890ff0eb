"""One training step on one device, for `gpu.py`: raydet's own and a bare one, with the time of each part."""

import contextlib
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForObjectDetection

from raydet.config import ResolvedTrainConfig
from raydet.models.collate import Example, collate
from raydet.models.detector import AUTOCAST_DTYPES, Detector
from raydet.models.loading import load_detector
from raydet.tables.schema import Category
from raydet.training.trainer import Trainer

PARTS = ("copy", "forward", "loss", "backward", "update")
BOXES_PER_IMAGE = 7  # about the mean of COCO
LEARNING_RATE = 1e-5  # random weights must not diverge
NUM_WARM_UPS = 3
NUM_PROFILED = 5

Step = Callable[[], object]
Result = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Setting of all cases.

    Attributes:
        device: Device of the model.
        image_size: Side in pixels of the model's input.
        train_batch: Images per training step.
        predict_batch: Images per forward pass of scoring.
        case_s: Seconds to measure each case.
        categories: Classes of the models.
    """

    device: torch.device
    image_size: int
    train_batch: int
    predict_batch: int
    case_s: float
    categories: tuple[Category, ...]


def measure_raydet(checkpoint: str, precision: str, setting: Setting) -> Result:
    """Measure raydet's training step, from batches in host memory.

    Args:
        checkpoint: Model folder.
        precision: fp32, bf16 or bf16_compile.
        setting: The benchmark's setting.
    """
    amount, _, is_compiled = precision.partition("_")
    config = ResolvedTrainConfig(
        train_data="-",
        val_data="-",
        out="-",
        model=checkpoint,
        image_size=setting.image_size,
        batch_size=setting.train_batch,
        learning_rate=LEARNING_RATE,
        ema_decay=0.9999,
        precision=amount,  # type: ignore[arg-type]
        compile=bool(is_compiled),
    )
    trainer = Trainer(config, setting.categories, steps_per_epoch=10_000, device=setting.device, rank=0, world_size=1)
    trainer.begin_epoch()
    batches: list[Any] = [
        SimpleNamespace(batch=collate(_examples(seed, setting)), image_ids=[]) for seed in range(NUM_WARM_UPS)
    ]
    clock = _StepClock(setting.device)
    upcoming, earlier = trainer.prepare(batches[:1]), None

    def step() -> None:
        nonlocal upcoming, earlier
        clock.start()
        outcome = trainer.step(upcoming)
        # As the training loop does, copy the next batch and read the last result while the device works.
        upcoming = trainer.prepare([batches[trainer.position.step % len(batches)]])
        assert earlier is None or not earlier.read().is_skipped, "the gradient is not finite"
        earlier = outcome
        clock.mark()

    with clock.watching(trainer.detector.model):
        result = _measure(step, setting)
    return {**result, **clock.medians()}


def measure_bare(checkpoint: str, precision: str, setting: Setting) -> Result:
    """Measure forward, backward and optimizer of plain transformers, over tensors on the device.

    Args:
        checkpoint: Model folder.
        precision: fp32 or bf16.
        setting: The benchmark's setting.
    """
    detector = load_detector(checkpoint).to(setting.device)
    batches = [_tensors(detector, seed, setting) for seed in range(NUM_WARM_UPS)]
    model: Any = AutoModelForObjectDetection.from_pretrained(checkpoint, dtype=torch.float32)
    model.to(setting.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    dtype = AUTOCAST_DTYPES[precision]
    number = 0

    def step() -> None:
        nonlocal number
        pixels, labels = batches[number % len(batches)]
        number += 1
        with torch.autocast(setting.device.type, dtype, enabled=dtype is not None):
            loss = model(pixel_values=pixels, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return _measure(step, setting)


def _examples(seed: int, setting: Setting) -> list[Example]:
    rng = np.random.default_rng(seed)
    side = setting.image_size
    examples = []
    for number in range(setting.train_batch):
        image = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
        centres, extents = rng.uniform(0.3, 0.7, (BOXES_PER_IMAGE, 2)), rng.uniform(0.1, 0.5, (BOXES_PER_IMAGE, 2))
        boxes = np.concatenate([centres, extents], axis=1).astype(np.float32)
        categories = rng.integers(0, len(setting.categories), BOXES_PER_IMAGE)
        examples.append(Example(number, image, (side, side), boxes, categories))
    return examples


def _tensors(detector: Detector, seed: int, setting: Setting) -> tuple[Tensor, list[dict[str, Tensor]]]:
    batch = collate(_examples(seed, setting)).to(setting.device)
    return detector.model_inputs(batch)["pixel_values"], batch.labels


class _StepClock:
    """Times at which the parts of a step start, on the host and on the device's time line."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._steps: list[list[tuple[float, Any]]] = []

    def start(self) -> None:
        """Begin a step."""
        self._steps.append([])
        self.mark()

    def mark(self) -> None:
        """Begin the next part, or end the step."""
        event = None
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        self._steps[-1].append((time.perf_counter(), event))

    @contextlib.contextmanager
    def watching(self, model: Any) -> Iterator[None]:
        """Context manager: mark forward, loss and backward of a transformers model while the block runs."""
        loss_function, backward = model.loss_function, torch.autograd.backward

        def marked_backward(*args: Any, **kwargs: Any) -> None:
            self.mark()
            backward(*args, **kwargs)
            self.mark()

        hook = nn.Module.register_forward_pre_hook(model, lambda *_: self.mark())
        model.loss_function, torch.autograd.backward = _MarkedLoss(loss_function, self.mark), marked_backward
        try:
            yield
        finally:
            hook.remove()
            model.loss_function, torch.autograd.backward = loss_function, backward

    def medians(self) -> Result:
        """Return the median milliseconds of each part: `parts_ms` on the device, `host_ms` on the host."""
        steps = self._steps[NUM_WARM_UPS:-NUM_PROFILED]
        assert all(len(marks) == len(PARTS) + 1 for marks in steps), (
            "the parts of a step are not those that the benchmark knows"
        )
        host = [[(end[0] - start[0]) * 1e3 for start, end in itertools.pairwise(marks)] for marks in steps]
        device = host
        if self._on_gpu:
            torch.cuda.synchronize()
            device = [[start[1].elapsed_time(end[1]) for start, end in itertools.pairwise(marks)] for marks in steps]
        return {"parts_ms": _by_part(device), "host_ms": _by_part(host)}


class _MarkedLoss:
    """A loss function that first calls another function; its attributes are those of the original."""

    def __init__(self, loss_function: Any, mark: Step) -> None:
        self._loss_function, self._mark = loss_function, mark

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._mark()
        return self._loss_function(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loss_function, name)


def _by_part(steps: Sequence[Sequence[float]]) -> dict[str, float]:
    return {
        part: round(statistics.median(times), 3) for part, times in zip(PARTS, zip(*steps, strict=True), strict=True)
    }


def _measure(step: Step, setting: Setting) -> Result:
    """Run a step for `case_s` after a warm-up; return its rate, its time and the share of the device's time."""
    for _ in range(NUM_WARM_UPS):
        step()
    step_s = seconds_per_call(step, setting)
    return {
        "images_per_s": round(setting.train_batch / step_s, 2),
        "step_ms": round(step_s * 1e3, 3),
        "device_share": device_share(step, step_s, setting),
        "peak_mb": round(torch.cuda.max_memory_allocated() / 2**20) if setting.device.type == "cuda" else None,
    }


def seconds_per_call(call: Step, setting: Setting) -> float:
    """Call a function for about `case_s`, at least twice, and return the mean seconds of a call."""
    synchronise(setting)
    started, number = time.perf_counter(), 0
    while number < 2 or time.perf_counter() - started < setting.case_s:
        call()
        number += 1
    synchronise(setting)
    return (time.perf_counter() - started) / number


def synchronise(setting: Setting) -> None:
    """Wait for the device."""
    if setting.device.type == "cuda":
        torch.cuda.synchronize()


def device_share(call: Step, call_s: float, setting: Setting) -> float:
    """Return the fraction of a call's time in which the device is busy.

    On a GPU, it is busy with the kernels and copies that the profiler reports, overlapping ones counted once. On a
    CPU, the result is the CPU time divided by the wall time and the number of threads.

    Args:
        call: A call that has been warmed up.
        call_s: Seconds of a call without the profiler.
        setting: The benchmark's setting.
    """
    if setting.device.type != "cuda":
        started_s, cpu_s = time.perf_counter(), time.process_time()
        for _ in range(NUM_PROFILED):
            call()
        cpu_s, wall_s = time.process_time() - cpu_s, time.perf_counter() - started_s
        return round(cpu_s / torch.get_num_threads() / wall_s, 3)
    from torch.autograd import DeviceType  # type: ignore[attr-defined]  # public, but not exported explicitly

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(NUM_PROFILED):
            call()
        torch.cuda.synchronize()
    busy_us, reached_us = 0.0, 0.0
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiler.events() or ()
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    )
    for start_us, end_us in spans:
        busy_us += max(0.0, end_us - max(start_us, reached_us))
        reached_us = max(reached_us, end_us)
    return round(busy_us / 1e6 / NUM_PROFILED / call_s, 3)

"""Scoring on one device, for `gpu.py`: from pixels on the device and from JPEG bytes, with the engine of `predict`."""

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch

from raydet.augmentation.view import View, decoded
from raydet.config import DEFAULT_MAX_PIXELS, PredictConfig
from raydet.engines.detector_engine import EngineBatch
from raydet.engines.torch_engine import TorchEngine
from raydet.models.geometry import Image, ResizeRule, SizeHW, resized_planes

if TYPE_CHECKING:
    from benchmarks.gpu_training import Result, Setting, device_share, seconds_per_call
else:  # a script imports its neighbours without the package name
    from gpu_training import Result, Setting, device_share, seconds_per_call

NUM_THREADS = len(os.sched_getaffinity(0))
BATCHES_AHEAD = 3
BATCHES_IN_FLIGHT = 2


def measure_engine(checkpoint: str, precision: str, jpegs: Sequence[bytes], setting: Setting) -> dict[str, Result]:
    """Measure one engine with each source of images.

    Args:
        checkpoint: Model folder.
        precision: fp32, bf16 or bf16_compile.
        jpegs: Encoded images, which are repeated.
        setting: The benchmark's setting.
    """
    amount, _, is_compiled = precision.partition("_")
    config = PredictConfig(
        data="-",
        out="-",
        checkpoint=checkpoint,
        precision=amount,  # type: ignore[arg-type]
        compile=bool(is_compiled),
        resize_on="device",  # of images that are not resized yet
    )
    # On a GPU the threads decode, one image each.
    num_threads = 1 if setting.device.type == "cuda" else torch.get_num_threads()
    engine = TorchEngine.load(config, device=str(setting.device), num_threads=num_threads)
    view, size = View(resize_rule=engine.resize_rule), setting.predict_batch
    seen = [_planes(view, data) for data in itertools.islice(itertools.cycle(jpegs), size)]
    predict = _in_flight(engine, itertools.repeat(_assembled(engine, seen)))
    for _ in range(2 * BATCHES_IN_FLIGHT):
        predict()
    call_s = seconds_per_call(predict, setting)
    results = {"tensors": _rate(size, call_s) | {"device_share": device_share(predict, call_s, setting)}}
    results["jpegs"] = _measure_jpegs(
        engine, jpegs, lambda data: _planes(view, data), lambda images: _assembled(engine, images), setting
    )
    results["jpegs_device_resize"] = _measure_jpegs(
        engine,
        jpegs,
        lambda data: decoded(data, max_pixels=DEFAULT_MAX_PIXELS)[0],
        engine.prepare,
        setting,
    )
    return results


def measure_threads(rule: ResizeRule, jpegs: Sequence[bytes], setting: Setting) -> dict[str, Result]:
    """Measure decoding alone, and decoding with the resize of the view, in all threads."""
    view = View(resize_rule=rule)
    works: dict[str, Callable[[bytes], Any]] = {
        "decode": lambda data: decoded(data, max_pixels=DEFAULT_MAX_PIXELS),
        "decode_resize": lambda data: _planes(view, data),
    }
    some = list(itertools.islice(itertools.cycle(jpegs), NUM_THREADS * 4))
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(NUM_THREADS) as pool:

            def rate(work: Callable[[bytes], Any]) -> Result:
                call_s = seconds_per_call(lambda: list(pool.map(work, some)), setting)
                return _rate(len(some), call_s) | {"threads": NUM_THREADS}

            return {name: rate(work) for name, work in works.items()}
    finally:
        torch.set_num_threads(num_threads)


def _measure_jpegs(
    engine: TorchEngine,
    jpegs: Sequence[bytes],
    read: Callable[[bytes], Any],
    assemble: Callable[[list[Any]], list[EngineBatch]],
    setting: Setting,
) -> Result:
    """Measure scoring in which threads read images and assemble the next batches while the device runs one."""
    source = itertools.cycle(jpegs)
    with ThreadPoolExecutor(NUM_THREADS) as readers, ThreadPoolExecutor(1) as assembler:

        def submit() -> "Future[list[EngineBatch]]":
            images = [readers.submit(read, data) for data in itertools.islice(source, setting.predict_batch)]
            return assembler.submit(lambda: assemble([image.result() for image in images]))

        def batches() -> Iterator[list[EngineBatch]]:
            ahead = deque(submit() for _ in range(BATCHES_AHEAD))
            while True:
                yield ahead.popleft().result()
                ahead.append(submit())

        predict = _in_flight(engine, batches())
        for _ in range(BATCHES_AHEAD):  # until the first batches, prepared before the clock starts, are used up
            predict()
        return _rate(setting.predict_batch, seconds_per_call(predict, setting))


def _in_flight(engine: TorchEngine, batches: Iterator[list[EngineBatch]]) -> Callable[[], object]:
    """Return a function that starts a batch, then fetches the results of an earlier one, as `Scorer` does."""
    started: deque[Callable[[], object]] = deque()

    def predict() -> None:
        started.append(engine.start(next(batches)))
        if len(started) == BATCHES_IN_FLIGHT:
            started.popleft()()

    return predict


def _planes(view: View, data: bytes) -> tuple[Image, SizeHW]:
    image, size_hw = decoded(data, max_pixels=view.max_pixels)
    rule = view.resize_rule
    return resized_planes(image, rule.target_size_hw(size_hw), rule.resample), size_hw


def _assembled(engine: TorchEngine, images: Sequence[tuple[Image, SizeHW]]) -> list[EngineBatch]:
    return engine.prepare_planes([planes for planes, _ in images], [size_hw for _, size_hw in images])


def _rate(num_images: int, seconds: float) -> Result:
    return {"images_per_s": round(num_images / seconds, 1)}

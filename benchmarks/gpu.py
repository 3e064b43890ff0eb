"""A training step and scoring on one GPU, without Ray, compared with a bare loop.

    python benchmarks/gpu.py [--models rt_detr_v2_r18 rt_detr_v2_r50 d_fine_s] [--precisions bf16 fp32 bf16_compile]
        [--seconds 240] [--quick]

The benchmark runs from a checkout and requires only torch, torchvision, transformers, timm, scipy, numpy, pyarrow and
Pillow. The models have the values of the published configs and random weights. Every case is measured for
`--case-seconds`. Cases run in order of importance, and those that would exceed `--seconds` are skipped and listed.

- MODEL_PRECISION_step: raydet's training step, from a batch in host memory to the moving average. `parts_ms`
  splits the device's time line at the points at which the host starts each part: `copy` (collate, copy to the device),
  `forward`, `loss` (with matching), `backward`, `update` (clipping, optimizer, moving average). `host_ms` splits the
  host's time at the same points.
- MODEL_PRECISION_bare: forward, backward and optimizer of plain transformers, over tensors on the device.
- MODEL_PRECISION_tensors: the engine of `predict`, from resized pixels on the device to detections in memory.
- MODEL_PRECISION_jpegs: the same from 640 × 480 JPEGs in memory, which threads decode and resize.
- MODEL_PRECISION_jpegs_device_resize: threads decode, the device resizes.
- decode, decode_resize: the threads alone.

`bf16_compile` is bf16 with `torch.compile`. `device_share` is the fraction of the time in which the device runs a
kernel or a copy; on a CPU, the CPU time divided by the wall time and the number of threads. The last line is one JSON
object.
"""

import argparse
import gc
import json
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))  # a bare GPU machine has a checkout, but no installed raydet

from raydet.models.geometry import ResizeRule
from raydet.models.loading import build_detector
from raydet.models.small import SMALL_MODELS
from raydet.tables.schema import Category

if TYPE_CHECKING:
    from benchmarks.generated_jpegs import jpegs
    from benchmarks.gpu_scoring import measure_engine, measure_threads
    from benchmarks.gpu_training import PARTS, Result, Setting, measure_bare, measure_raydet
    from benchmarks.published_models import PUBLISHED, published_detector
else:  # a script imports its neighbours without the package name
    from generated_jpegs import jpegs
    from gpu_scoring import measure_engine, measure_threads
    from gpu_training import PARTS, Result, Setting, measure_bare, measure_raydet
    from published_models import PUBLISHED, published_detector

PRECISIONS = ("bf16", "fp32", "bf16_compile")
LARGEST_CASE_S = 90.0
"""Time limit of a case, which stops one that compiles for too long."""


@dataclass(frozen=True)
class Case:
    """A measurement.

    Attributes:
        name: Start of the names of its results.
        needs_s: Seconds that the case needs; it is skipped if less time is left.
        run: Produces the results, by the end of their names.
    """

    name: str
    needs_s: float
    run: Callable[[], dict[str, Result]]


class _TooSlow(BaseException):
    """A case exceeded its time limit; not an `Exception`, which compilers catch."""


def main() -> None:
    """Run the cases and print the results."""
    started = time.perf_counter()
    options = _parse()
    if options.quick:
        torch.set_num_threads(1)  # threads of a tiny model mostly wait for each other
    setting = Setting(
        device=torch.device(options.device),
        image_size=options.image_size,
        train_batch=options.train_batch,
        predict_batch=options.predict_batch,
        case_s=options.case_seconds,
        categories=tuple(Category(number + 1, f"class {number + 1}") for number in range(80)),
    )
    results: dict[str, Result] = {}
    skipped: dict[str, str] = {}
    signal.signal(signal.SIGALRM, _stop_case)
    # As in each training worker.
    store = dist.HashStore()  # type: ignore[attr-defined]  # public, but not exported explicitly
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="raydet-benchmark-", ignore_cleanup_errors=True) as folder:
        for case in _cases(options, setting, Path(folder)):
            left_s = options.seconds - (time.perf_counter() - started)
            reason = _run(case, left_s, results)
            if reason:
                skipped[case.name] = reason
                print(f"{case.name}: {reason}", flush=True)
    dist.destroy_process_group()
    machine = _machine(setting)
    _print(results, setting, machine, time.perf_counter() - started)
    print(json.dumps({**results, "machine": machine, "skipped": skipped}))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*PUBLISHED, *SMALL_MODELS]
    parser.add_argument(
        "--models", nargs="+", choices=names, metavar="MODEL", help="models to measure: " + ", ".join(PUBLISHED)
    )
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS)
    parser.add_argument("--device", help="device of the model; default: cuda, or cpu with --quick")
    parser.add_argument(
        "--image-size", type=int, help="side in pixels of the model's input; default: 640, or 64 with --quick"
    )
    parser.add_argument("--train-batch", type=int, help="images per training step; default: 16, or 2 with --quick")
    parser.add_argument(
        "--predict-batch", type=int, help="images per forward pass of scoring; default: 32, or 4 with --quick"
    )
    parser.add_argument("--case-seconds", type=float, help="time to measure a case; default: 2, or 0.3 with --quick")
    parser.add_argument("--seconds", type=float, default=240.0, help="time limit of all cases together")
    parser.add_argument("--quick", action="store_true", help="tiny models on the CPU, without torch.compile")
    options = parser.parse_args()
    quick = bool(options.quick)
    for name, short, full in (
        ("models", ["rt_detr_v2_tiny", "d_fine_tiny"], list(PUBLISHED)),
        ("precisions", ["bf16", "fp32"], list(PRECISIONS)),
        ("device", "cpu", "cuda"),
        ("image_size", 64, 640),
        ("train_batch", 2, 16),
        ("predict_batch", 4, 32),
        ("case_seconds", 0.3, 2.0),
    ):
        if getattr(options, name) is None:
            setattr(options, name, short if quick else full)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("torch finds no GPU; use --quick, or --device cpu")
    return options


def _cases(options: argparse.Namespace, setting: Setting, folder: Path) -> Iterator[Case]:
    """Yield the cases in the order of importance; a compiled model comes last, because it takes long."""
    images = jpegs(32)
    rule = ResizeRule(mode="fixed", size_hw=(setting.image_size, setting.image_size))
    yield Case("threads", 0.0, lambda: measure_threads(rule, images, setting))
    for name in options.models:
        _save(name, folder / name, setting)
    measured_s, compiled_s = 4 * setting.case_s, 20.0
    precisions = [precision for precision in options.precisions if "compile" not in precision]
    for name in options.models:
        checkpoint = str(folder / name)
        for precision in precisions:
            # The bare loop comes first, so that nothing that raydet switches on makes it faster.
            bare = partial(measure_bare, checkpoint, precision, setting)
            step = partial(measure_raydet, checkpoint, precision, setting)
            yield Case(f"{name}_{precision}_bare", measured_s, _alone(bare))
            yield Case(f"{name}_{precision}_step", measured_s, _alone(step))
    for name in options.models:
        for precision in precisions:
            engine = partial(measure_engine, str(folder / name), precision, images, setting)
            yield Case(f"{name}_{precision}", 2 * measured_s, engine)
    for precision in options.precisions:
        for name in options.models if "compile" in precision else ():
            engine = partial(measure_engine, str(folder / name), precision, images, setting)
            step = partial(measure_raydet, str(folder / name), precision, setting)
            yield Case(f"{name}_{precision}", 2 * measured_s + compiled_s, engine)
            yield Case(f"{name}_{precision}_step", measured_s + 2 * compiled_s, _alone(step))


def _alone(measure: Callable[[], Result]) -> Callable[[], dict[str, Result]]:
    return lambda: {"": measure()}


def _save(name: str, folder: Path, setting: Setting) -> None:
    if name in PUBLISHED:
        detector = published_detector(name, setting.categories, image_size=setting.image_size)
    else:
        detector = build_detector(name, setting.categories, image_size=setting.image_size, seed=0)
    detector.save(str(folder))


def _run(case: Case, left_s: float, results: dict[str, Result]) -> str | None:
    """Run a case and add its results; return the reason if it was skipped."""
    if left_s < case.needs_s:
        return "no time left"
    _reset(left_s)
    try:
        found = case.run()
    except _TooSlow:
        return "too slow"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    for end, result in found.items():
        name = end if case.name == "threads" else "_".join(part for part in (case.name, end) if part)
        results[name] = result
        print(f"{name}: {result['images_per_s']:.1f} images/s", flush=True)
    return None


def _reset(left_s: float) -> None:
    """Free the memory of the last case, restore torch's defaults that raydet may change, and set the time limit."""
    gc.collect()
    torch.compiler.reset()
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = False, True
    torch.backends.cudnn.benchmark = False
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    signal.setitimer(signal.ITIMER_REAL, min(LARGEST_CASE_S, max(left_s, 1.0)))


def _stop_case(*_: Any) -> None:
    raise _TooSlow


def _machine(setting: Setting) -> dict[str, Any]:
    on_gpu = setting.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(setting.device) if on_gpu else platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "image_size": setting.image_size,
        "train_batch": setting.train_batch,
        "predict_batch": setting.predict_batch,
    }


def _print(results: dict[str, Result], setting: Setting, machine: dict[str, Any], seconds: float) -> None:
    print(f"\n{', '.join(f'{key} {value}' for key, value in machine.items())}; {seconds:.0f} s")
    width = max((len(name) for name in results), default=0) + 2
    print(f"{'case':<{width}} {'images/s':>9} {'step ms':>8} {'busy':>6} " + " ".join(f"{part:>9}" for part in PARTS))
    for name, result in results.items():
        parts = [f"{result['parts_ms'][part]:>9.2f}" for part in PARTS] if "parts_ms" in result else []
        step_ms = f"{result['step_ms']:.2f}" if "step_ms" in result else ""
        share = f"{result['device_share']:.2f}" if "device_share" in result else ""
        print(f"{name:<{width}} {result['images_per_s']:>9.1f} {step_ms:>8} {share:>6} " + " ".join(parts))
    for name, result in results.items():
        bare = results.get(name.removesuffix("step") + "bare")
        if name.endswith("_step") and bare is not None:
            print(f"{name} / bare: {result['images_per_s'] / bare['images_per_s']:.3f}")


if __name__ == "__main__":
    main()

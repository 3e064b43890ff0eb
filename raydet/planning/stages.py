"""Cost of an image in each stage, measured in a separate process without Ray.

`probe.py` starts several processes `python -m raydet.planning.stages JOB` and synchronises them. After its warm-up, a
process prints `ready` and its device. For each line that it then receives, it works for a while and prints one JSON
object.
"""

import contextlib
import dataclasses
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import count, islice
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from raydet.augmentation.view import View, decoded
from raydet.common.errors import RunError, UserError
from raydet.config import DEFAULT_MAX_PIXELS, PredictConfig, TrainConfig
from raydet.engines.loading import load_engine
from raydet.engines.scorer import Scorer
from raydet.images.collection import ImageRow, open_collection
from raydet.images.decode import DecodeError
from raydet.models.backbone import backbone_parameter_names
from raydet.models.collate import Example, collate
from raydet.models.geometry import Image, SizeHW
from raydet.models.loading import build_detector
from raydet.models.losses.global_batch import Normaliser
from raydet.models.optim.optimizer import build_optimizer
from raydet.models.step import AUTOCAST_DTYPES, StepSetting, apply_gradients, compute_gradients, step_normaliser
from raydet.planning.processes import READY
from raydet.tables.schema import build_schema
from raydet.tables.table import Table, open_table

_WARM_UP_BATCHES = 2
_TRAIN_COLUMNS = ("image_id", "image", "objects")
_MEETING_TIMEOUT = timedelta(minutes=5)


@dataclass(frozen=True, kw_only=True)
class StageJob:
    """Settings of a measurement.

    Attributes:
        job: predict or train.
        table: Images table that stores its image files.
        model: Model folder or name.
        image_size: Input side in pixels, in training; None for the model's own.
        engine: Engine of predict.
        precision: fp32, bf16 or fp16.
        augmentation: Augmentation of train.
        batch_size: Images per batch.
        threads: Number of threads.
        use_gpu: True to run the model on a GPU; None to use one if available.
        with_model: True to run the model; False to measure only the stages before it.
        seconds: Length of a turn.
        num_ranks: Number of processes that train together.
        rank: Rank of this process.
        meeting: File through which the ranks find each other; None for a single process.
    """

    job: str
    table: str
    model: str
    image_size: int | None
    engine: Any
    precision: Any
    augmentation: Any
    batch_size: int
    threads: int
    use_gpu: bool | None
    with_model: bool
    seconds: float
    num_ranks: int = 1
    rank: int = 0
    meeting: str | None = None

    @property
    def device(self) -> str:
        """Device of the model: cpu or cuda."""
        wanted = torch.cuda.is_available() if self.use_gpu is None else self.use_gpu
        return "cuda" if wanted and self.engine == "torch" else "cpu"


@dataclass
class Clock:
    """CPU seconds (all threads of the process) and wall-clock seconds by stage."""

    cpu_s: dict[str, float] = field(default_factory=dict)
    wall_s: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def measuring(self, stage: str) -> Iterator[None]:
        """Context manager: add the duration of the block to a stage."""
        cpu_s, wall_s = time.process_time(), time.perf_counter()
        yield
        self.cpu_s[stage] = self.cpu_s.get(stage, 0.0) + time.process_time() - cpu_s
        self.wall_s[stage] = self.wall_s.get(stage, 0.0) + time.perf_counter() - wall_s


@dataclass
class _Pixels:
    """Number and size of the decoded images."""

    num_images: int = 0
    num_bytes: int = 0

    def add(self, size_hw: SizeHW) -> None:
        self.num_images += 1
        self.num_bytes += 3 * size_hw[0] * size_hw[1]


class _Scoring:
    """The work of `predict` on a batch."""

    gradient_bytes = 0

    def __init__(self, job: StageJob) -> None:
        self._job, self.pixels = job, _Pixels()
        images = open_collection(job.table, index_uri=None)
        self._rows = (row for _ in count() for row in images.read(0, images.num_rows))
        self._scorer: Scorer | None = None
        if job.with_model:
            config = PredictConfig(
                checkpoint=job.model,
                data=job.table,
                out="-",
                engine=job.engine,
                precision=job.precision,
                batch_size=job.batch_size,
                use_gpu=True if job.device == "cuda" else None,
            )
            engine = load_engine(config, device=job.device, num_threads=job.threads)
            self._scorer = Scorer(engine, config, batch_size=job.batch_size)
            self._schema = build_schema("detections", engine.categories)

    def batch(self, clock: Clock) -> int:
        """Score a batch and return its number of images."""
        with clock.measuring("read"):
            rows = list(islice(self._rows, self._job.batch_size))
        with clock.measuring("decode"):
            images = _readable(rows)
        for image in images:
            self.pixels.add((image.shape[0], image.shape[1]))
        if self._scorer is not None and images:
            with clock.measuring("prepare"):
                prepared = self._scorer.prepare(images)
            with clock.measuring("model"):
                found = self._scorer.predict(prepared)
            with clock.measuring("write"):
                records = [
                    {
                        "image_id": number,
                        "path": "",
                        "detections": {
                            "bbox": one.boxes_xywh.tolist(),
                            "score": one.scores.tolist(),
                            "category": one.categories.tolist(),
                        },
                    }
                    for number, one in enumerate(found)
                ]
                pq.write_table(pa.Table.from_pylist(records, self._schema), pa.BufferOutputStream())
        return len(rows)

    def continues(self, has_time: bool) -> bool:
        """Return True while this process has time left."""
        return has_time


def _readable(rows: list[ImageRow]) -> list[Image]:
    images = []
    for row in rows:
        with contextlib.suppress(DecodeError):
            images.append(decoded(row.data or b"", max_pixels=DEFAULT_MAX_PIXELS)[0])
    return images


_TOGETHER = "together"
"""Not a stage: the same training step repeated in all processes together."""


def _sum_over_ranks(tensor: Tensor) -> Tensor:
    dist.all_reduce(tensor)
    return tensor


class _Training:
    """The work of `train` on a batch: a step alone and, with several processes, the same step as one rank."""

    def __init__(self, job: StageJob) -> None:
        self._job, self.pixels = job, _Pixels()
        torch.set_num_threads(job.threads)
        table = open_table(job.table, "images")
        self._rows = _forever(table)
        self._detector = build_detector(job.model, table.categories, image_size=job.image_size, seed=0)
        self._view = View(resize_rule=self._detector.resize_rule, augmentation=job.augmentation)
        self._detector.to(torch.device(job.device))
        self._detector.model.train()
        self.gradient_bytes = sum(4 * one.numel() for one in self._detector.model.parameters() if one.requires_grad)
        config = TrainConfig(train_data=job.table, val_data=job.table, out="-", model=job.model)
        self._optimizer = build_optimizer(self._detector.model, config, backbone_parameter_names(self._detector.model))
        self._setting = StepSetting(
            device=torch.device(job.device),
            autocast_dtype=AUTOCAST_DTYPES[job.precision],
            world_size=1,
            scaler=torch.amp.GradScaler(job.device) if job.precision == "fp16" else None,
        )
        self._together: tuple[nn.Module, StepSetting] | None = None
        if job.num_ranks > 1:
            _meet(job)
            setting = dataclasses.replace(self._setting, world_size=job.num_ranks)
            self._together = DistributedDataParallel(self._detector.model, broadcast_buffers=False), setting

    def batch(self, clock: Clock) -> int:
        """Take a step and return its number of images."""
        with clock.measuring("read"):
            rows = list(islice(self._rows, self._job.batch_size))
        with clock.measuring("decode"):
            examples = [example for row in rows if (example := self._example(row)) is not None]
        if self._job.with_model:
            with clock.measuring("model"):
                self._step(self._detector.model, self._setting, examples)
            if self._together is not None:
                dist.barrier()
                with clock.measuring(_TOGETHER):
                    self._step(*self._together, examples)
        return len(rows)

    def continues(self, has_time: bool) -> bool:
        """Return True while any process has time left, because no rank can take a step alone."""
        return bool(_sum_over_ranks(torch.tensor(float(has_time)))) if self._together else has_time

    def _step(self, module: nn.Module, setting: StepSetting, examples: list[Example]) -> None:
        batch = collate(examples, pad_to_hw=self._detector.resize_rule.pad_to_hw)
        total = step_normaliser(self._detector, [batch])
        if setting.world_size > 1:
            total = Normaliser.from_tensor(_sum_over_ranks(total.to_tensor()))
        compute_gradients(self._detector, module, [batch], setting, total=total)
        apply_gradients(self._detector.model, self._optimizer, max_grad_norm=0.1, scaler=setting.scaler)
        if setting.device.type == "cuda":
            torch.cuda.synchronize()

    def _example(self, row: dict[str, Any]) -> Example | None:
        try:
            seen = self._view.augmented(row, epoch=0, resize_rule=self._view.step_resize_rule(0, 0))
        except DecodeError:
            return None
        self.pixels.add(seen.original_size_hw)
        return Example(
            image_id=row["image_id"],
            image=seen.image,
            original_size_hw=seen.original_size_hw,
            boxes=seen.boxes_cxcywh,
            categories=seen.categories,
        )


def _meet(job: StageJob) -> None:
    """Make this process one of the training ranks, using loopback ports only."""
    loopback = [
        name
        for name, addresses in psutil.net_if_addrs().items()
        if any(one.family == socket.AF_INET and one.address == "127.0.0.1" for one in addresses)
    ]
    if loopback:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback[0])
    dist.init_process_group(
        "gloo", init_method=f"file://{job.meeting}", rank=job.rank, world_size=job.num_ranks, timeout=_MEETING_TIMEOUT
    )


def _forever(table: Table) -> Iterator[dict[str, Any]]:
    for _ in count():
        for batch in table.iter_batches(_TRAIN_COLUMNS, batch_size=64):
            yield from batch.to_pylist()


class StageWork:
    """The measurements of one process, in turns."""

    def __init__(self, job: StageJob) -> None:
        """Load the model and warm up.

        Raises:
            UserError: No image can be decoded, or the model cannot run with these settings.
        """
        self._job = job
        self._work = _Scoring(job) if job.job == "predict" else _Training(job)
        self._startup_cpu_s = time.process_time()
        for _ in range(_WARM_UP_BATCHES):
            self._work.batch(Clock())
        if not self._work.pixels.num_images:
            raise UserError("none of the sampled images can be decoded; set --data to other images")

    def take_turn(self) -> dict[str, Any]:
        """Measure for one turn.

        Returns:
            For this turn: `num_images`, `num_batches`, `cpu_s` and `wall_s` by stage, and `waiting_s`, the additional
            time of all steps when several processes take them together. For the process: the mean `pixel_bytes`,
            `gradient_bytes`, and `startup_cpu_s`, the CPU seconds until it was ready.
        """
        clock, num_images, num_batches = Clock(), 0, 0
        began = time.perf_counter()
        while self._work.continues(num_batches == 0 or time.perf_counter() - began < self._job.seconds):
            num_images += self._work.batch(clock)
            num_batches += 1
        clock.cpu_s.pop(_TOGETHER, None)
        together_s = clock.wall_s.pop(_TOGETHER, None)
        pixels = self._work.pixels
        return {
            "num_images": num_images,
            "num_batches": num_batches,
            "cpu_s": clock.cpu_s,
            "wall_s": clock.wall_s,
            "waiting_s": 0.0 if together_s is None else together_s - clock.wall_s["model"],
            "pixel_bytes": pixels.num_bytes / max(1, pixels.num_images),
            "gradient_bytes": self._work.gradient_bytes,
            "startup_cpu_s": self._startup_cpu_s,
        }


def main() -> int:
    """Measure as the command line requests, one turn per input line."""
    try:
        job = StageJob(**json.loads(sys.argv[1]))
        work = StageWork(job)
        print(READY, job.device, flush=True)
        for _ in sys.stdin:
            print(json.dumps(work.take_turn()), flush=True)
    except (RunError, UserError) as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())

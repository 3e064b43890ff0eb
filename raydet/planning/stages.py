"""What an image costs in each stage, measured in a process of its own, without Ray.

`probe.py` starts it as `python -m raydet.planning.stages JOB`, several at a time, and lets all go at once: the
process says `ready` when it has warmed up, waits for a line, works for a while, and prints one JSON object.
"""

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count, islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from raydet.boxes import xywh_to_normalised_cxcywh
from raydet.collate import Example
from raydet.config import DEFAULT_MAX_PIXELS, PredictConfig, TrainConfig
from raydet.decode import DecodeError, decode
from raydet.engines import load_engine
from raydet.errors import RunError, UserError
from raydet.geometry import Image, resize
from raydet.inputs import ImageRow, open_images
from raydet.inputs.references import image_bytes
from raydet.mixing import sample_of
from raydet.models import backbone_parameter_names, build_detector
from raydet.optim import build_optimizer
from raydet.planning.processes import READY
from raydet.schema import build_schema
from raydet.scoring import Scorer
from raydet.step import StepSetting, apply_gradients, compute_gradients
from raydet.tables import Table, open_table
from raydet.transforms import Augmenter

_WARM_UP_BATCHES = 2
_TRAIN_COLUMNS = ("image_id", "image", "objects")
_AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class StageJob:
    """What is to be measured.

    Attributes:
        job: predict or train.
        table: Images table, with the bytes in it.
        model: Folder or name.
        image_size: In training, in pixels; null for the model's own.
        engine: Of predict.
        precision: fp32, bf16 or fp16.
        augmentation: Of train.
        batch_size: Images at once.
        threads: To compute with.
        use_gpu: Whether the model is to be on a GPU; null for where there is one.
        with_model: Without it only what happens before the model.
        seconds: How long to work.
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

    @property
    def device(self) -> str:
        """cpu or cuda."""
        wanted = torch.cuda.is_available() if self.use_gpu is None else self.use_gpu
        return "cuda" if wanted and self.engine == "torch" else "cpu"


@dataclass
class Clock:
    """Seconds by stage: of CPU, all threads of the process, and of time."""

    cpu_s: dict[str, float] = field(default_factory=dict)
    wall_s: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def measuring(self, stage: str) -> Iterator[None]:
        """Adds the time of a `with` to a stage."""
        cpu_s, wall_s = time.process_time(), time.perf_counter()
        yield
        self.cpu_s[stage] = self.cpu_s.get(stage, 0.0) + time.process_time() - cpu_s
        self.wall_s[stage] = self.wall_s.get(stage, 0.0) + time.perf_counter() - wall_s


@dataclass
class _Pixels:
    """How large the pictures are, once decoded."""

    num_images: int = 0
    num_bytes: int = 0

    def add(self, images: list[Image]) -> None:
        self.num_images += len(images)
        self.num_bytes += sum(image.nbytes for image in images)


class _Scoring:
    """What `predict` does with a batch."""

    gradient_bytes = 0

    def __init__(self, job: StageJob) -> None:
        self._job, self.pixels = job, _Pixels()
        images = open_images(job.table, index_uri=None)
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
        """Scores a batch; returns its number of images."""
        with clock.measuring("read"):
            rows = list(islice(self._rows, self._job.batch_size))
        with clock.measuring("decode"):
            images = _decoded(rows)
        self.pixels.add(images)
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


def _decoded(rows: list[ImageRow]) -> list[Image]:
    images = []
    for row in rows:
        with contextlib.suppress(DecodeError):
            images.append(decode(row.data or b"", max_pixels=DEFAULT_MAX_PIXELS))
    return images


class _Training:
    """What `train` does with a batch."""

    def __init__(self, job: StageJob) -> None:
        self._job, self.pixels = job, _Pixels()
        torch.set_num_threads(job.threads)
        table = open_table(job.table, "images")
        self._rows = _forever(table)
        self._augment = Augmenter(job.augmentation)
        self._detector = build_detector(job.model, table.categories, image_size=job.image_size, seed=0)
        self._detector.to(torch.device(job.device))
        self._detector.model.train()
        self.gradient_bytes = sum(4 * one.numel() for one in self._detector.model.parameters() if one.requires_grad)
        config = TrainConfig(train_data=job.table, val_data=job.table, out="-", model=job.model)
        self._optimizer = build_optimizer(self._detector.model, config, backbone_parameter_names(self._detector.model))
        self._setting = StepSetting(
            device=torch.device(job.device),
            autocast_dtype=_AUTOCAST[job.precision],
            world_size=1,
            sum_over_ranks=lambda value: value,
            scaler=torch.amp.GradScaler(job.device) if job.precision == "fp16" else None,
        )

    def batch(self, clock: Clock) -> int:
        """Takes a step; returns its number of images."""
        with clock.measuring("read"):
            rows = list(islice(self._rows, self._job.batch_size))
        with clock.measuring("decode"):
            examples = [example for row in rows if (example := self._example(row)) is not None]
        if self._job.with_model:
            with clock.measuring("model"):
                compute_gradients(self._detector, self._detector.model, [examples], self._setting)
                apply_gradients(self._detector.model, self._optimizer, max_grad_norm=0.1, scaler=self._setting.scaler)
                if self._setting.device.type == "cuda":
                    torch.cuda.synchronize()
        return len(rows)

    def _example(self, row: dict[str, Any]) -> Example | None:
        try:
            image = decode(image_bytes(row["image"]), max_pixels=DEFAULT_MAX_PIXELS)
        except DecodeError:
            return None
        self.pixels.add([image])
        sample = self._augment(sample_of(image, row["objects"]), seed=row["image_id"])
        rule, kept = self._detector.resize_rule, ~sample.iscrowd
        return Example(
            image_id=row["image_id"],
            image=resize(sample.image, rule.target_size_hw(sample.size_hw), rule.resample),
            original_size_hw=sample.size_hw,
            boxes=xywh_to_normalised_cxcywh(sample.boxes_xywh, sample.size_hw).astype(np.float32)[kept],
            labels=sample.labels[kept],
        )


def _forever(table: Table) -> Iterator[dict[str, Any]]:
    for _ in count():
        for batch in table.iter_batches(_TRAIN_COLUMNS, batch_size=64):
            yield from batch.to_pylist()


def measure(job: StageJob, *, wait: Callable[[], object]) -> dict[str, Any]:
    """Works for a while and returns what it took.

    Args:
        job: What to measure.
        wait: Called after warming up; work begins when it returns.

    Returns:
        `num_images`, `cpu_s` and `wall_s` by stage, `device`, and the mean `pixel_bytes` and `gradient_bytes`.

    Raises:
        UserError: No image can be decoded, or the model cannot be run so.
    """
    work = _Scoring(job) if job.job == "predict" else _Training(job)
    for _ in range(_WARM_UP_BATCHES):
        work.batch(Clock())
    if not work.pixels.num_images:
        raise UserError("none of the images that were tried can be decoded; give others with --data")
    wait()
    clock, num_images = Clock(), 0
    began = time.perf_counter()
    while num_images == 0 or time.perf_counter() - began < job.seconds:
        num_images += work.batch(clock)
    return {
        "num_images": num_images,
        "cpu_s": clock.cpu_s,
        "wall_s": clock.wall_s,
        "device": job.device,
        "pixel_bytes": work.pixels.num_bytes / max(1, work.pixels.num_images),
        "gradient_bytes": work.gradient_bytes,
    }


def main() -> int:
    """Measures what the command line asks for."""

    def wait() -> None:
        print(READY, flush=True)
        sys.stdin.readline()

    try:
        print(json.dumps(measure(StageJob(**json.loads(sys.argv[1])), wait=wait)), flush=True)
    except (RunError, UserError) as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())

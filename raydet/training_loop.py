"""The training loop, as it runs on every worker, CPU or GPU, one or many.

Rank 0 starts the stream of the run, every rank reads its part of it, and gradients, losses and detections are put
together over all ranks. The loop itself is `run_worker`; below it stand its steps, in the order in which it takes them.
"""

import contextlib
import io
import json
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train
import torch
import torch.distributed as dist
from ray.data import ExecutionResources
from ray.train.collective import broadcast_from_rank_zero
from ray.train.torch import get_device
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchmetrics import MeanMetric

from raydet import storage
from raydet.checkpoints import HISTORY_FILE, STATE_FILE
from raydet.cluster import Resources
from raydet.collate import Example, collate
from raydet.config import DEFAULT_MAX_PIXELS, TrainConfig
from raydet.data import Preparation, ReadyImage, micro_batches, run_stream
from raydet.metrics import NO_DETECTIONS, CocoAccumulator, CocoResult, ImageDetections
from raydet.models import Detector, backbone_parameter_names, build_detector
from raydet.optim import MovingAverage, build_optimizer, build_schedule
from raydet.ordering import Kind, MicroBatch, RunPlan
from raydet.step import StepSetting, apply_gradients, autocast, compute_gradients
from raydet.tables import Table

_Stream = Iterator[tuple[MicroBatch, list[ReadyImage]]]


@dataclass
class _Run:
    """What a worker holds while it trains."""

    config: TrainConfig
    rank: int
    setting: StepSetting
    detector: Detector
    module: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    average: MovingAverage | None
    history: list[dict[str, Any]]
    objects_group: Any
    board: Any


def run_worker(job: dict[str, Any]) -> None:
    """The training loop, on every worker."""
    config, tables = TrainConfig(**job["config"]), job["tables"]
    plan = _plan(config, tables)
    run = _start(config, tables["train"], plan, job["board"])
    if len(run.history) >= config.epochs:
        # A kill came after the last checkpoint and before the history was written.
        _write_history(run)
        return
    stream = micro_batches(_open_stream(run, plan, tables, job["resources"]))
    for epoch in range(len(run.history), config.epochs):
        entry = _train_epoch(run, plan, stream, epoch)
        with _averaged(run) as own_weights:
            if plan.validates(epoch):
                entry |= _validate(run, plan, stream, tables["validate"], epoch)
            run.history.append(entry)
            if run.rank == 0:
                _save(run, own_weights)
        if run.rank == 0:
            run.board.pin.remote(entry)
        ray.train.report(entry)


def _plan(config: TrainConfig, tables: dict[str, Table]) -> RunPlan:
    return RunPlan(
        train_groups=tuple((group.num_rows, group.num_bytes) for group in tables["train"].row_groups()),
        num_val=tables["validate"].num_rows,
        batch_size=config.batch_size,
        accumulate=config.accumulate,
        epochs=config.epochs,
        seed=config.seed,
        window_bytes=config.shuffle_window_mb * 2**20,
        validate_every=config.validate_every,
        validate_batch_size=config.validate_batch_size or config.batch_size,
    )


def _start(config: TrainConfig, train_table: Table, plan: RunPlan, board: Any) -> _Run:
    """Builds the model and all that goes with it, as new or as the last checkpoint has it."""
    context = ray.train.get_context()
    device = get_device()
    torch.set_num_threads(config.threads_per_worker or max(1, (os.cpu_count() or 1) // context.get_local_world_size()))
    detector = build_detector(
        config.model,
        train_table.categories,
        image_size=config.image_size,
        seed=config.seed,
        freeze_batch_norm=config.freeze_batch_norm,
    )
    detector.to(device)
    optimizer = build_optimizer(detector.model, config, backbone_parameter_names(detector.model))
    run = _Run(
        config=config,
        rank=context.get_world_rank(),
        setting=StepSetting(
            device=device,
            autocast_dtype=torch.bfloat16 if config.precision == "bf16" else None,
            world_size=context.get_world_size(),
            sum_over_ranks=_sum_over_ranks,
        ),
        detector=detector,
        module=detector.model,
        optimizer=optimizer,
        schedule=build_schedule(optimizer, config, plan.steps_per_epoch),
        average=MovingAverage(detector.model, config.ema_decay) if config.ema_decay else None,
        history=[],
        objects_group=dist.new_group(backend="gloo"),
        board=board,
    )
    _restore(run)
    if run.setting.world_size > 1:
        run.module = DistributedDataParallel(
            detector.model, device_ids=[device.index] if device.type == "cuda" else None, broadcast_buffers=False
        )
    return run


def _sum_over_ranks(tensor: Tensor) -> Tensor:
    if dist.get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def _open_stream(run: _Run, plan: RunPlan, tables: dict[str, Table], resources: Resources) -> Any:
    """Rank 0 starts the stream from where the run stands; every rank gets its part of it."""
    config, world_size = run.config, run.setting.world_size
    reference = None
    if run.rank == 0:
        iterators = run_stream(
            plan,
            train=tables["train"],
            val=tables["validate"],
            preparation=Preparation(
                augmentation=config.augmentation,
                plain_from_epoch=config.epochs - config.plain_epochs,
                resize_rule=run.detector.resize_rule,
                max_pixels=DEFAULT_MAX_PIXELS,
                seed=config.seed,
            ),
            world_size=world_size,
            start_epoch=len(run.history),
            start_step=0,
            reserved=ExecutionResources(
                cpu=resources.cpus_per_worker * world_size, gpu=float(world_size) if resources.use_gpu else 0.0
            ),
            cpus_per_task=resources.cpus_per_task,
        )
        reference = [ray.put(iterators)]
    return ray.get(broadcast_from_rank_zero(reference)[0])[run.rank]


def _train_epoch(run: _Run, plan: RunPlan, stream: _Stream, epoch: int) -> dict[str, Any]:
    """The optimizer steps of an epoch; returns its line of the history."""
    run.detector.model.train()
    losses: dict[str, MeanMetric] = {}
    norms = MeanMetric(sync_on_compute=False).to(run.setting.device)
    unreadable: set[int] = set()
    waited_s, started = 0.0, time.perf_counter()
    for step in range(plan.steps_per_epoch):
        asked = time.perf_counter()
        parts = [_next(stream, "train", epoch, step, part, run.rank) for part in range(run.config.accumulate)]
        waited_s += time.perf_counter() - asked
        unreadable.update(image.image_id for part in parts for image in part if image.error)
        # Dropout and denoising draw from what (seed, epoch, step, rank) name, so that a resumed run goes on alike.
        torch.manual_seed(int(np.random.SeedSequence([run.config.seed, epoch, step, run.rank]).generate_state(1)[0]))
        result = compute_gradients(run.detector, run.module, [_examples(part) for part in parts], run.setting)
        norms.update(apply_gradients(run.module, run.optimizer, max_grad_norm=run.config.max_grad_norm))
        run.schedule.step()
        if run.average is not None:
            run.average.update(run.detector.model)
        for name, value in result.terms.items():
            losses.setdefault(name, MeanMetric(sync_on_compute=False).to(run.setting.device)).update(value)
        if run.rank == 0:
            run.board.show.remote({"epoch": epoch + 1, "step": step + 1, "num_steps": plan.steps_per_epoch})
    seconds = time.perf_counter() - started
    names = sorted(losses)
    means = _sum_over_ranks(torch.stack([losses[name].compute() for name in names])).tolist()
    terms = dict(zip(names, means, strict=True))
    return {
        "epoch": epoch + 1,
        "loss": sum(terms.values()),
        "losses": terms,
        "gradient_norm": norms.compute().item(),
        "learning_rate": run.optimizer.param_groups[-1]["lr"],
        "images_per_s": plan.num_train / seconds,
        "seconds": seconds,
        "waited_for_data_s": waited_s,
        "unreadable": len(set().union(*(_gather(run, unreadable) or []))),
    }


def _next(stream: _Stream, kind: Kind, epoch: int, step: int, part: int, rank: int) -> list[ReadyImage]:
    """Takes the next micro-batch and makes sure that it is the one the plan says."""
    got, images = next(stream)
    assert got == MicroBatch(kind, epoch, step, part, rank, ()), f"the stream is out of step: got {got}"
    return images


def _examples(images: list[ReadyImage]) -> list[Example]:
    return [
        Example(image.image_id, image.image, image.original_size_hw, image.boxes_cxcywh, image.labels)
        for image in images
        if image.image is not None
    ]


def _validate(run: _Run, plan: RunPlan, stream: _Stream, table: Table, epoch: int) -> dict[str, Any]:
    """Exact COCO numbers over every validation image once; the same on every rank."""
    started = time.perf_counter()
    accumulator = CocoAccumulator(table.categories)
    run.detector.model.eval()
    for number in range(plan.validation_rounds(run.setting.world_size)):
        _score(run, _next(stream, "validate", epoch, number, 0, run.rank), accumulator)
    shards = _gather(run, accumulator.to_bytes())
    numbers: list[dict[str, Any] | None] = [None]
    if shards is not None:
        merged = CocoAccumulator(table.categories)
        for shard in shards:
            merged.merge(shard)
        numbers = [_numbers(merged.result())]
    dist.broadcast_object_list(numbers, src=0, group=run.objects_group)
    assert numbers[0] is not None
    return {**numbers[0], "validation_s": time.perf_counter() - started}


def _score(run: _Run, images: list[ReadyImage], accumulator: CocoAccumulator) -> None:
    examples = _examples(images)
    found = {}
    if examples:
        batch = collate(examples, pad_to_hw=run.detector.resize_rule.pad_to_hw).to(run.setting.device)
        with autocast(run.setting):
            detections = run.detector.predict(batch)
        found = dict(zip(batch.image_ids, detections, strict=True))
    for image in images:
        detected = found.get(image.image_id)
        accumulator.add(
            image.image_id,
            image.original_size_hw,
            image.truth(),
            NO_DETECTIONS
            if detected is None
            else ImageDetections(detected.boxes_xywh, detected.scores, detected.categories),
            unreadable=image.error is not None,
        )


def _gather(run: _Run, value: Any) -> list[Any] | None:
    """Every rank's value on rank 0, in the order of the ranks; null on the others."""
    gathered: list[Any] | None = [None] * run.setting.world_size if run.rank == 0 else None
    dist.gather_object(value, gathered, dst=0, group=run.objects_group)
    return gathered


@contextlib.contextmanager
def _averaged(run: _Run) -> Iterator[dict[str, Tensor]]:
    """For the time of a `with`, the model is the one to be validated and saved; yields the weights that learn."""
    model = run.detector.model
    if run.average is None:
        _average_statistics(run)
        yield model.state_dict()
        return
    own_weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
    model.load_state_dict(run.average.shadow)
    _average_statistics(run)
    try:
        yield own_weights
    finally:
        model.load_state_dict(own_weights)


def _average_statistics(run: _Run) -> None:
    """Makes the batch-norm statistics, which each rank gathers over its own images, the same on all ranks."""
    if run.setting.world_size == 1:
        return
    for buffer in run.detector.model.buffers():
        if buffer.is_floating_point():
            dist.all_reduce(buffer)
            buffer /= run.setting.world_size


def _save(run: _Run, own_weights: dict[str, Tensor]) -> None:
    """Writes OUT/checkpoint if this epoch is the best so far, then OUT/last, then the history.

    In this order a kill between any two costs nothing: what OUT/last does not know of is done again.
    """
    out = run.config.out
    scored = [entry["AP"] for entry in run.history if entry.get("AP") is not None]
    newest = run.history[-1].get("AP")
    # Without any number to go by, the newest is as good as any.
    is_best = newest >= max(scored) if newest is not None else not scored
    with tempfile.TemporaryDirectory(prefix="raydet-checkpoint-") as folder:
        run.detector.save(folder)
        if is_best:
            storage.publish_folder(folder, storage.join(out, "checkpoint"))
        state = {
            "history": json.dumps(run.history),
            "model": own_weights,
            "average": None if run.average is None else run.average.state_dict(),
            "optimizer": run.optimizer.state_dict(),
            "schedule": run.schedule.state_dict(),
        }
        torch.save(state, Path(folder) / STATE_FILE)
        storage.publish_folder(folder, storage.join(out, "last"))
    _write_history(run)


def _write_history(run: _Run) -> None:
    if run.rank == 0:
        storage.write_bytes(storage.join(run.config.out, HISTORY_FILE), json.dumps(run.history, indent=1).encode())


def _restore(run: _Run) -> None:
    """Goes on from OUT/last, if it is there."""
    path = storage.join(run.config.out, "last", STATE_FILE)
    if not storage.exists(path):
        return
    state = torch.load(io.BytesIO(storage.read_bytes(path)), map_location=run.setting.device, weights_only=True)
    run.detector.model.load_state_dict(state["model"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.schedule.load_state_dict(state["schedule"])
    if run.average is not None:
        run.average.load_state_dict(state["average"])
    run.history = json.loads(state["history"])


def _numbers(result: CocoResult) -> dict[str, Any]:
    """What the history keeps of a validation; null where there is nothing to measure."""
    by_class = {
        category.name: numbers.AP for category, numbers in zip(result.categories, result.per_class, strict=True)
    }
    return {
        **{name: None if value == -1 else value for name, value in result.numbers().items()},
        "AP_by_class": {name: None if value == -1 else value for name, value in by_class.items()},
        "validation_unreadable": result.num_unreadable,
    }

"""The training loop, as it runs on every worker, CPU or GPU, one or many.

Rank 0 starts the stream of the run, every rank reads its part of it, and gradients, losses and detections are put
together over all ranks. The loop itself is `run_worker`; below it stand its steps, in the order in which it takes them.
"""

import logging
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray
import ray.train
import torch
from ray.data import ExecutionResources
from ray.train.collective import broadcast_from_rank_zero
from ray.train.torch import get_device

from raydet.augmentation.view import View
from raydet.cluster import job_metrics
from raydet.cluster.shares import Resources, cpus_for_tasks
from raydet.cluster.worker_log import log_from_here
from raydet.common.threads import available_cpus
from raydet.config import TrainConfig
from raydet.models.detector import Detector
from raydet.models.processors import resize_rule_of, resized_processor
from raydet.models.step import StepResult
from raydet.tables import storage
from raydet.tables.table import Table
from raydet.training.batches import BatchReader, ReadyBatch
from raydet.training.crew import Crew
from raydet.training.failure import cannot_write, is_out_of_memory, not_a_number, out_of_memory
from raydet.training.history import EpochRecord, is_best_so_far, is_over, write_history
from raydet.training.meter import epoch_record, merge_states
from raydet.training.ordering import RunPlan
from raydet.training.state import TrainingState, load_state, newest_state, save_state
from raydet.training.stream import run_stream
from raydet.training.tracking.trackers import RunTracker, scalars_of
from raydet.training.trainer import Trainer
from raydet.training.validation import validate

_LOG = logging.getLogger(__name__)
_STEPS_BETWEEN_LOGS = 10
_STEPS_BETWEEN_LOOKS = 20
"""Steps after which the workers ask Ray whether a node of theirs is about to be taken away."""


@dataclass(frozen=True)
class _Run:
    """What the steps of the loop share; of all this only the trainer changes."""

    config: TrainConfig
    plan: RunPlan
    train_table: Table
    val_table: Table
    trainer: Trainer
    crew: Crew
    tracker: RunTracker | None

    @property
    def is_over(self) -> bool:
        config = self.config
        return is_over(
            self.trainer.history,
            epochs=config.epochs,
            metric=config.metric_for_best_model,
            patience=config.early_stopping_patience,
        )


def run_worker(job: dict[str, Any]) -> None:
    """Trains from the newest state to the end of the run, or until the command asks to stop."""
    run = _start(job)
    if not run.is_over:
        reader = _open_stream(run, job["resources"])
        while not run.is_over and _train_epoch(run, reader) and _finish_epoch(run, reader):
            pass
    if run.crew.rank == 0:
        # A kill may have come after the last state and before the history was written.
        write_history(run.config.out, run.trainer.history)
    if run.tracker is not None:
        run.tracker.close()


def _start(job: dict[str, Any]) -> _Run:
    """Builds the trainer, as new or as the newest state has it."""
    config, tables, crew = TrainConfig(**job["config"]), job["tables"], Crew(job["board"])
    log_from_here(storage.join(config.out, "log"), rank=crew.rank)
    local_size = ray.train.get_context().get_local_world_size()
    torch.set_num_threads(config.threads_per_worker or max(1, available_cpus() // local_size))
    plan = RunPlan.of_training(config, tables["train"], num_val=tables["validate"].num_rows)
    trainer = Trainer(
        config,
        tables["train"].categories,
        steps_per_epoch=plan.steps_per_epoch,
        device=get_device(),
        rank=crew.rank,
        world_size=crew.world_size,
    )
    # Rank 0 says which state, so that it is the same for all.
    name = broadcast_from_rank_zero(newest_state(config.out) if crew.rank == 0 else None)
    if name is not None:
        state = load_state(config.out, name, trainer.device)
        trainer.load_state_dict(state.of_rank(crew.rank, crew.world_size))
    elif trainer.detector.reinitialised:
        crew.say(f"these weights start anew: {', '.join(trainer.detector.reinitialised)}")
    position, tracker = trainer.position, None
    text = "one of %d workers, on %s with %d threads, starts after step %d of epoch %d"
    _LOG.info(text, crew.world_size, trainer.device, torch.get_num_threads(), position.step, position.epoch + 1)
    if crew.rank == 0:
        start_step = position.epoch * plan.steps_per_epoch + position.step
        tracker = RunTracker(config.out, config.trackers, job["config"], start_step=start_step, warn=crew.say)
    return _Run(config, plan, tables["train"], tables["validate"], trainer, crew, tracker)


def _open_stream(run: _Run, resources: Resources) -> BatchReader:
    """Rank 0 starts the stream from where the run stands; every rank gets its part of it."""
    crew, reference = run.crew, None
    if crew.rank == 0:
        iterators = run_stream(
            run.plan,
            train=run.train_table,
            val=run.val_table,
            view=_view(run.config, run.trainer.detector),
            world_size=crew.world_size,
            start_epoch=run.trainer.position.epoch,
            start_step=run.trainer.position.step,
            reserved=ExecutionResources(
                cpu=resources.cpus_per_worker * crew.world_size,
                gpu=float(crew.world_size) if resources.use_gpu else 0.0,
            ),
            cpus_per_task=cpus_for_tasks(resources),
        )
        reference = [ray.put(iterators)]
    return BatchReader(ray.get(broadcast_from_rank_zero(reference)[0])[crew.rank], crew.rank)


def _view(config: TrainConfig, detector: Detector) -> View:
    """The view of the run; with `multi_scale` each step draws one of several resizes."""
    rules = [
        resize_rule_of(resized_processor(detector.processor, detector.family, size), where=config.model)
        for size in config.multi_scale or ()
    ]
    return View.of_training(config, detector.resize_rule, tuple(rules))


def _train_epoch(run: _Run, reader: BatchReader) -> bool:
    """Takes the optimizer steps that are left of the epoch; false when the command asked to stop on the way."""
    trainer, every, num_steps = run.trainer, run.config.save_every_steps, run.plan.steps_per_epoch
    epoch = trainer.position.epoch
    if trainer.begin_epoch():
        run.crew.say(f"the backbone learns from epoch {epoch + 1} on")
    while trainer.position.step < num_steps:
        is_to_stop = _take_step(run, reader)
        step = trainer.position.step
        if is_to_stop or (every and step % every == 0 and step < num_steps):
            _save_state(run)
        if is_to_stop:
            run.crew.show(epoch, step, num_steps)
            return False
    return True


def _take_step(run: _Run, reader: BatchReader) -> bool:
    """One optimizer step; returns whether the run is to stop after it."""
    trainer, meter = run.trainer, run.trainer.meter
    epoch, step = trainer.position.epoch, trainer.position.step
    is_first, asked = not reader.has_begun, time.perf_counter()
    batches = [reader.take("train", epoch, step, part) for part in range(run.config.gradient_accumulation_steps)]
    started = time.perf_counter()
    if is_first:
        meter.start_s += started - asked
        asked = started
    meter.data_s += started - asked
    for batch in batches:
        meter.unreadable.update(batch.unreadable)
    result = _gradients(run, batches)
    with meter.communicating():
        loss, is_to_stop = _agree(run, result, batches)
    learning_rates = {f"learning_rate/{group['name']}": group["lr"] for group in trainer.optimizer.param_groups}
    norm = trainer.apply_gradients()
    num_images = sum(batch.num_images for batch in batches)
    meter.num_images += num_images
    meter.seconds += time.perf_counter() - asked
    job_metrics.step_taken(num_images)
    if run.crew.rank == 0:
        job_metrics.step_finished(epoch + 1, loss)
    global_step = epoch * run.plan.steps_per_epoch + step
    if run.tracker is not None and global_step % _STEPS_BETWEEN_LOGS == 0:
        run.tracker.scalars(global_step + 1, {"step/loss": loss, "step/gradient_norm": norm, **learning_rates})
    return is_to_stop


def _gradients(run: _Run, batches: list[ReadyBatch]) -> StepResult:
    try:
        return run.trainer.compute_gradients(batches)
    except ValueError as error:
        if not any(text in str(error) for text in ("invalid numeric", "nan", "inf")):
            raise
        # Boxes or scores that are no numbers cannot even be matched with the truth; transformers refuses them.
        images = [image_id for batch in batches for image_id in batch.image_ids]
        raise not_a_number(run.trainer.position, ["the matching of boxes"], images) from error
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        largest = max((example.image.shape[:2] for batch in batches for example in batch.examples), default=(0, 0))
        most = max(len(batch.examples) for batch in batches)
        raise out_of_memory(run.trainer.position, run.config, num_images=most, size_hw=largest) from error


def _agree(run: _Run, result: StepResult, batches: list[ReadyBatch]) -> tuple[float, bool]:
    """The loss of the global batch, and whether the run is to stop after this step.

    Raises:
        WorkerFailed: On all ranks, when the loss of one is not a number.
    """
    loss = float(torch.stack(list(result.terms.values())).sum())
    is_to_stop = _is_to_stop(run)
    num_bad, num_stopping, total = run.crew.all_sum([float(not np.isfinite(loss)), float(is_to_stop), loss])
    if num_bad:
        bad = [name for name, value in result.terms.items() if not torch.isfinite(value)]
        gathered = run.crew.gather((bad, [image_id for batch in batches for image_id in batch.image_ids])) or []
        names = sorted({name for names, _ in gathered for name in names})
        images = [image_id for names, ids in gathered if names for image_id in ids]
        raise not_a_number(run.trainer.position, names, images)
    return total, num_stopping > 0


def _is_to_stop(run: _Run) -> bool:
    """Shows how far the run is and learns, some steps later, whether to stop; saves when a node is to be taken away."""
    position = run.trainer.position
    if position.step % _STEPS_BETWEEN_LOOKS == 0 and run.crew.notices_preemption():
        _save_state(run)
    if run.crew.rank != 0:
        return False
    progress = {"epoch": position.epoch + 1, "step": position.step + 1, "num_steps": run.plan.steps_per_epoch}
    return run.crew.is_asked_to_stop(progress)


def _finish_epoch(run: _Run, reader: BatchReader) -> bool:
    """Validates, enters the epoch into the history, and saves; false when the command asked to stop on the way."""
    trainer, plan, crew, epoch = run.trainer, run.plan, run.crew, run.trainer.position.epoch
    record = _record_of_steps(run)
    with trainer.averaged():
        validation = None
        if plan.validates(epoch):
            validation = validate(trainer, crew, plan, reader, categories=run.val_table.categories, tracker=run.tracker)
        is_to_stop = plan.validates(epoch) and validation is None
        if not is_to_stop:
            record = replace(record, validation=validation)
            trainer.end_epoch(record)
            if crew.rank == 0:
                _writing(run, lambda: _publish(run))
    _save_state(run)
    if is_to_stop:  # the state is that of the epoch's last step: resuming begins with the validation
        crew.show(epoch, plan.steps_per_epoch, plan.steps_per_epoch)
        return False
    if run.tracker is not None:
        run.tracker.scalars((epoch + 1) * plan.steps_per_epoch, scalars_of(record))
        run.tracker.flush()
    if crew.rank == 0:
        job_metrics.epoch_validated(record.value("AP"))
    crew.announce(record)
    ray.train.report({"epoch": record.epoch})
    return True


def _record_of_steps(run: _Run) -> EpochRecord:
    """The record of the epoch so far, without a validation; the same on all ranks."""
    trainer, crew = run.trainer, run.crew
    meter, epoch = trainer.meter, trainer.position.epoch + 1
    text = "epoch %d: %d images in %.1f s, of it %.1f s waiting for images, %.1f s for other workers"
    _LOG.info(text, epoch, meter.num_images, meter.seconds, meter.data_s, meter.communication_s)
    states = crew.gather(meter.to_state())
    record = None
    if states is not None:
        learning_rate = trainer.optimizer.param_groups[0]["lr"]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
        on_device = None
        if trainer.device.type == "cuda":
            on_device = round(torch.cuda.max_memory_allocated(trainer.device) / 2**20)
        record = replace(
            epoch_record(merge_states(states), epoch=epoch, learning_rate=learning_rate),
            peak_memory_mb=round(peak),
            peak_device_memory_mb=on_device,
        )
    shared: EpochRecord = crew.share(record)
    return shared


def _publish(run: _Run) -> None:
    """Writes OUT/checkpoint if this epoch is the best so far, then OUT/last.

    The state comes after them: a kill between any two costs nothing, since the run repeats what the state lacks.
    """
    out = run.config.out
    with tempfile.TemporaryDirectory(prefix="raydet-checkpoint-") as folder:
        run.trainer.detector.save(folder)
        if is_best_so_far(run.trainer.history, run.config.metric_for_best_model):
            storage.publish_folder(folder, storage.join(out, "checkpoint"))
        storage.publish_folder(folder, storage.join(out, "last"))


def _save_state(run: _Run) -> None:
    """Writes a state to resume from; all ranks take part."""
    own = run.trainer.state_dict()
    locals_of_ranks = run.crew.gather({"meter": own["meter"], "buffers": own["buffers"]})
    if locals_of_ranks is not None:
        state = TrainingState.of_ranks(own, locals_of_ranks)
        _writing(run, lambda: save_state(run.config.out, state, keep=run.config.keep_states))
        _writing(run, lambda: write_history(run.config.out, run.trainer.history))


def _writing(run: _Run, write: Callable[[], None]) -> None:
    """Ends the run with a clear line when a checkpoint cannot be written."""
    try:
        write()
    except OSError as error:
        raise cannot_write(run.trainer.position, run.config, error) from error

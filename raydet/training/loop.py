"""The training loop that runs on every worker, on CPU or GPU.

Rank 0 starts the stream of the run, every rank reads its own part, and gradients, losses and detections are combined
over all ranks. `run_worker` is the loop; its parts follow in the order in which they run.
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
from raydet.training.history import EpochRecord, is_best_so_far, is_over, write_history, write_stopped_epoch
from raydet.training.meter import epoch_record, merge_states
from raydet.training.ordering import RunPlan
from raydet.training.state import TrainingState, load_state, newest_state, save_state
from raydet.training.stream import run_stream
from raydet.training.tracking.trackers import RunTracker, scalars_of
from raydet.training.trainer import Trainer
from raydet.training.validation import validate

_LOG = logging.getLogger(__name__)
_STEPS_BETWEEN_LOGS = 10
_STEPS_BETWEEN_PREEMPTION_CHECKS = 20


@dataclass(frozen=True)
class _TrainingRun:
    """Objects that the parts of the loop share. Only the trainer changes during the run."""

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
    """Train from the newest state to the end of the run, or until the command asks to stop."""
    run = _start(job)
    if not run.is_over:
        reader = _open_stream(run, job["resources"])
        while not run.is_over and _train_epoch(run, reader) and _finish_epoch(run, reader):
            pass
    if run.crew.rank == 0:
        # An earlier process may have been killed after saving its last state and before writing the history.
        write_history(run.config.out, run.trainer.history)
    if run.tracker is not None:
        run.tracker.close()


def _start(job: dict[str, Any]) -> _TrainingRun:
    """Build the trainer and restore the newest state, if there is one."""
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
    # Rank 0 picks the state, so that all ranks load the same one.
    name = broadcast_from_rank_zero(newest_state(config.out) if crew.rank == 0 else None)
    if name is not None:
        state = load_state(config.out, name, trainer.device)
        trainer.load_state_dict(state.of_rank(crew.rank, crew.world_size))
    elif trainer.detector.reinitialised:
        crew.say(f"initialised from scratch: {', '.join(trainer.detector.reinitialised)}")
    position, tracker = trainer.position, None
    text = "one of %d workers, device %s, %d threads; starting after step %d of epoch %d"
    _LOG.info(text, crew.world_size, trainer.device, torch.get_num_threads(), position.step, position.epoch + 1)
    if crew.rank == 0:
        start_step = position.epoch * plan.steps_per_epoch + position.step
        tracker = RunTracker(config.out, config.trackers, job["config"], start_step=start_step, warn=crew.say)
    return _TrainingRun(config, plan, tables["train"], tables["validate"], trainer, crew, tracker)


def _open_stream(run: _TrainingRun, resources: Resources) -> BatchReader:
    """Start the stream at the trainer's position on rank 0, and return the reader of this rank's part."""
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
    """Make the view of the run; with `multi_scale`, each step draws one of several resize rules."""
    rules = [
        resize_rule_of(resized_processor(detector.processor, detector.family, size), where=config.model)
        for size in config.multi_scale or ()
    ]
    return View.of_training(config, detector.resize_rule, tuple(rules))


def _train_epoch(run: _TrainingRun, reader: BatchReader) -> bool:
    """Run the remaining optimizer steps of the epoch; return False if the command asked to stop."""
    trainer, every, num_steps = run.trainer, run.config.save_every_steps, run.plan.steps_per_epoch
    epoch = trainer.position.epoch
    if trainer.begin_epoch():
        run.crew.say(f"the backbone is trained from epoch {epoch + 1} on")
    while trainer.position.step < num_steps:
        is_to_stop = _run_step(run, reader)
        step = trainer.position.step
        if is_to_stop or (every and step % every == 0 and step < num_steps):
            _save_state(run)
        if is_to_stop:
            _write_stopped_epoch(run)
            run.crew.show(epoch, step, num_steps)
            return False
    return True


def _run_step(run: _TrainingRun, reader: BatchReader) -> bool:
    """Run one optimizer step; return True if the run must stop afterwards."""
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


def _gradients(run: _TrainingRun, batches: list[ReadyBatch]) -> StepResult:
    try:
        return run.trainer.compute_gradients(batches)
    except ValueError as error:
        if not any(text in str(error) for text in ("invalid numeric", "nan", "inf")):
            raise
        # transformers refuses to match boxes or scores that are not finite.
        images = [image_id for batch in batches for image_id in batch.image_ids]
        raise not_a_number(run.trainer.position, ["box matching"], images) from error
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        largest = max((example.image.shape[:2] for batch in batches for example in batch.examples), default=(0, 0))
        most = max(len(batch.examples) for batch in batches)
        raise out_of_memory(run.trainer.position, run.config, num_images=most, size_hw=largest) from error


def _agree(run: _TrainingRun, result: StepResult, batches: list[ReadyBatch]) -> tuple[float, bool]:
    """Combine a step over all ranks.

    Returns:
        Loss of the global batch; True if the run must stop after this step.

    Raises:
        WorkerFailed: The loss of any rank is not finite; raised on all ranks.
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


def _is_to_stop(run: _TrainingRun) -> bool:
    """Report progress and return True if the command asks to stop, a few steps late; save before a preemption."""
    position = run.trainer.position
    if position.step % _STEPS_BETWEEN_PREEMPTION_CHECKS == 0 and run.crew.notices_preemption():
        _save_state(run)
    if run.crew.rank != 0:
        return False
    progress = {"epoch": position.epoch + 1, "step": position.step + 1, "num_steps": run.plan.steps_per_epoch}
    return run.crew.is_asked_to_stop(progress)


def _finish_epoch(run: _TrainingRun, reader: BatchReader) -> bool:
    """Validate, add the epoch to the history, and save; return False if the command asked to stop."""
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
    if is_to_stop:  # the state is that after the epoch's last step, so that a resumed run starts with the validation
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


def _record_of_steps(run: _TrainingRun) -> EpochRecord:
    """Make the record of the epoch without its validation; the same on all ranks."""
    trainer, crew = run.trainer, run.crew
    meter, epoch = trainer.meter, trainer.position.epoch + 1
    text = "epoch %d: %d images in %.1f s, including %.1f s waiting for images and %.1f s waiting for other workers"
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


def _publish(run: _TrainingRun) -> None:
    """Write OUT/checkpoint if this epoch is the best so far, then OUT/last.

    The state is written afterwards: if the run is killed in between, it resumes from the earlier state and writes both
    folders again.
    """
    out = run.config.out
    with tempfile.TemporaryDirectory(prefix="raydet-checkpoint-") as folder:
        run.trainer.detector.save(folder)
        if is_best_so_far(run.trainer.history, run.config.metric_for_best_model):
            storage.publish_folder(folder, storage.join(out, "checkpoint"))
        storage.publish_folder(folder, storage.join(out, "last"))


def _save_state(run: _TrainingRun) -> None:
    """Save a state to resume from. Collective: every rank must call it."""
    own = run.trainer.state_dict()
    locals_of_ranks = run.crew.gather({"meter": own["meter"], "buffers": own["buffers"]})
    if locals_of_ranks is not None:
        state = TrainingState.of_ranks(own, locals_of_ranks)
        _writing(run, lambda: save_state(run.config.out, state, keep=run.config.keep_states))
        _writing(run, lambda: write_history(run.config.out, run.trainer.history))


def _write_stopped_epoch(run: _TrainingRun) -> None:
    record = _record_of_steps(run)
    if run.crew.rank == 0:
        _writing(run, lambda: write_stopped_epoch(run.config.out, record))


def _writing(run: _TrainingRun, write: Callable[[], None]) -> None:
    """Call `write` and convert a failure to write a checkpoint to one that ends the run."""
    try:
        write()
    except OSError as error:
        raise cannot_write(run.trainer.position, run.config, error) from error

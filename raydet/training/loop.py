"""The training loop that runs on every worker, on CPU or GPU.

The first rank of each node starts the stream for the ranks of that node, every rank reads its own part, and gradients,
losses and detections are combined over all ranks. `run_worker` is the loop; its parts follow in the order in which they
run.
"""

import logging
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import ray
import torch

from raydet.augmentation.view import View
from raydet.cluster import job_metrics
from raydet.cluster.shares import Resources, decoders_near
from raydet.cluster.worker_log import log_from_here
from raydet.common.allocator import keep_freed_memory
from raydet.common.class_names import indices_in
from raydet.common.threads import available_cpus
from raydet.config import ResolvedTrainConfig
from raydet.models.adapters.lora import merged, num_trained
from raydet.models.processors import step_resize_rules
from raydet.tables import storage
from raydet.tables.table import Table
from raydet.training.crew import Crew
from raydet.training.failure import is_out_of_memory, out_of_memory, too_many_skipped
from raydet.training.feeding.batches import BatchReader, ClassMap
from raydet.training.feeding.mixture import Mixture
from raydet.training.feeding.ordering import Kind, RunPlan
from raydet.training.feeding.stream import read_stream, run_stream
from raydet.training.feeding.views import Views
from raydet.training.history import EpochRecord, is_over, write_history, write_stopped_epoch
from raydet.training.in_flight import LateResult, LateResults, StepInputs, StepOutcome
from raydet.training.meter import epoch_record, merge_states
from raydet.training.progress import WorkerProgress
from raydet.training.recovery.overrides import Override, settings_at
from raydet.training.recovery.skipping import MOST_KEPT, SkippedStep, SkipWatch, skipped_step
from raydet.training.saving import Saver, Write
from raydet.training.state import Position, TrainingState, discard_states, newest_state, parse_state
from raydet.training.tracking.trackers import RunTracker, scalars_of
from raydet.training.trainer import Trainer
from raydet.training.validation import validate

_LOG = logging.getLogger(__name__)
_STEPS_BETWEEN_LOGS = 10
_STEPS_BETWEEN_PREEMPTION_CHECKS = 20
_NEWEST_LOSS = 0.1
"""Weight of the newest loss in the moving mean."""


class RecentLoss:
    """Moving mean of the loss, to show to the user."""

    def __init__(self) -> None:
        self.value: float | None = None

    def add(self, loss: float) -> None:
        """Add the loss of a step."""
        self.value = loss if self.value is None else self.value + _NEWEST_LOSS * (loss - self.value)


@dataclass(frozen=True)
class _TrainingRun:
    """Objects that the parts of the loop share."""

    config: ResolvedTrainConfig
    plan: RunPlan
    train_table: Table | Mixture
    val_table: Table | Mixture
    trainer: Trainer
    crew: Crew
    tracker: RunTracker | None
    results: LateResults
    saver: Saver
    overrides: tuple[Override, ...]
    watch: SkipWatch
    recent_loss: RecentLoss = field(default_factory=RecentLoss)

    @property
    def is_over(self) -> bool:
        config = self.config
        return is_over(
            self.trainer.history,
            epochs=config.epochs,
            metric=config.metric_for_best_model,
            patience=config.early_stopping_patience,
        )


def run_worker(job: dict[str, Any], crew: Crew) -> None:
    """Train from the newest state to the end of the run, or until the command asks to stop."""
    run = _start(job, crew)
    try:
        if not run.is_over:
            reader = _open_stream(run, job["resources"])
            while not run.is_over and _train_epoch(run, reader) and _finish_epoch(run, reader):
                pass
        run.saver.wait()
    finally:
        run.saver.close()
    if run.crew.rank == 0:
        # An earlier process may have been killed after saving its last state and before writing the history.
        write_history(run.config.out, run.trainer.history)
    if run.tracker is not None:
        run.tracker.close()


def _start(job: dict[str, Any], crew: Crew) -> _TrainingRun:
    """Build the trainer and restore the newest state, if there is one."""
    config, tables = ResolvedTrainConfig(**job["config"]), job["tables"]
    if crew.device.type == "cpu":
        keep_freed_memory(one_heap=False)
    log_from_here(storage.join(config.out, "log"), rank=crew.rank)
    torch.set_num_threads(config.threads_per_worker or max(1, available_cpus() // crew.local_world_size))
    overrides: tuple[Override, ...] = job["overrides"]
    breaks = tuple(one.start for one in overrides)
    plan = RunPlan.of_training(config, tables["train"], num_val=tables["validate"].num_rows, breaks=breaks)
    trainer = (job["make_trainer"] or Trainer)(
        config,
        job["categories"],
        steps_per_epoch=plan.steps_per_epoch,
        device=crew.device,
        rank=crew.rank,
        world_size=crew.world_size,
    )
    trainer.follow(overrides)
    # Rank 0 reads the state, so that all ranks have the same one and the store is read once.
    data = crew.share_bytes(newest_state(config.out) if crew.rank == 0 else None)
    if data is not None:
        trainer.load_state_dict(parse_state(data, trainer.device).of_rank(crew.rank, crew.world_size))
    else:
        for note in trainer.detector.notes:
            crew.say(note)
    position, tracker = trainer.position, None
    text = "one of %d workers, device %s, %d threads; starting after step %d of epoch %d"
    _LOG.info(text, crew.world_size, trainer.device, torch.get_num_threads(), position.step, position.epoch + 1)
    if crew.rank == 0:
        start_step = position.epoch * plan.steps_per_epoch + position.step
        tracker = RunTracker(
            config.out,
            config.trackers,
            job["config"],
            start_step=start_step,
            steps_per_epoch=plan.steps_per_epoch,
            warn=crew.say,
        )
    return _TrainingRun(
        config=config,
        plan=plan,
        train_table=tables["train"],
        val_table=tables["validate"],
        trainer=trainer,
        crew=crew,
        tracker=tracker,
        results=LateResults(),
        saver=Saver(config),
        overrides=overrides,
        watch=SkipWatch(),
    )


def _open_stream(run: _TrainingRun, resources: Resources) -> BatchReader:
    """Start this node's stream at the trainer's position, and return the reader of this rank's part."""
    crew = run.crew
    nodes = crew.exchange(ray.get_runtime_context().get_node_id())
    ranks = [rank for rank, node in enumerate(nodes) if node == nodes[crew.rank]]
    content = None
    if crew.rank == ranks[0]:
        iterators = run_stream(
            run.plan,
            train=run.train_table,
            val=run.val_table,
            views=_views(run),
            world_size=crew.world_size,
            ranks=ranks,
            start_epoch=run.trainer.position.epoch,
            start_step=run.trainer.position.step,
            decoders=decoders_near(nodes[crew.rank], nodes, cpus_per_worker=resources.cpus_per_worker),
        )
        if crew.world_size == 1:
            return BatchReader(read_stream(iterators[0]), crew.rank, _class_maps(run))
        # Pickled, not in the object store: Ray does not track references that travel outside it.
        content = ray.cloudpickle.dumps(iterators)
    iterators = ray.cloudpickle.loads(crew.exchange(content)[ranks[0]])
    return BatchReader(read_stream(iterators[ranks.index(crew.rank)]), crew.rank, _class_maps(run))


def _class_maps(run: _TrainingRun) -> dict[Kind, ClassMap]:
    """Return, for each table whose classes have another order than the model's, the model's index of each class."""
    names = [category.name for category in run.trainer.detector.categories]
    tables: dict[Kind, Table | Mixture] = {"train": run.train_table, "validate": run.val_table}
    maps: dict[Kind, ClassMap] = {}
    for kind, table in tables.items():
        own = [category.name for category in table.categories]
        if own != names:
            maps[kind] = indices_in(own, names)
    return maps


def _views(run: _TrainingRun) -> Views:
    """Make the view of each step; with `multi_scale`, each step draws one of several resize rules."""
    config, detector = run.config, run.trainer.detector
    rules = step_resize_rules(detector.processor, detector.family, config.multi_scale, where=config.model)

    def view(at: ResolvedTrainConfig) -> View:
        return View.of_training(at, detector.resize_rule, rules)

    changes = [(one.start, view(settings_at(config, run.overrides, *one.start))) for one in run.overrides]
    return Views(view(config), tuple(changes))


def _train_epoch(run: _TrainingRun, reader: BatchReader) -> bool:
    """Run the remaining optimizer steps of the epoch; return False if the command asked to stop.

    While the device computes a step, the images of the next one arrive. The results of a step are read while the device
    computes the one after it.
    """
    trainer, every, num_steps = run.trainer, run.config.save_every_steps, run.plan.steps_per_epoch
    if trainer.begin_epoch():
        run.crew.say(f"the backbone is trained from epoch {trainer.position.epoch + 1} onwards")
    inputs = _take(run, reader) if trainer.position.step < num_steps else None
    while inputs is not None:
        started = time.perf_counter()
        is_to_stop = _agree(run, inputs)
        _end_if_stuck(run, inputs)
        if is_to_stop:
            return _stop(run, inputs)
        if trainer.position.step % _STEPS_BETWEEN_PREEMPTION_CHECKS == 0 and run.crew.notices_preemption():
            _save_state(run, inputs)
            run.saver.wait()
        run.results.add(_step(run, inputs))
        trainer.meter.num_images += len(inputs.image_ids)
        trainer.meter.seconds += time.perf_counter() - started
        job_metrics.step_taken(len(inputs.image_ids))
        step = trainer.position.step
        inputs = _take(run, reader) if step < num_steps else None
        run.saver.check()
        if every and step % every == 0 and step < num_steps:
            _settle(run, inputs)
            if not run.watch.row:  # else there is a state with the same weights, or they are useless
                _save_state(run, inputs)
    _settle(run, None)
    _end_if_stuck(run, None)
    return True


def _take(run: _TrainingRun, reader: BatchReader) -> StepInputs:
    """Wait for the images of the next step, start copying them to the device, and report the step before the latest."""
    trainer, meter = run.trainer, run.trainer.meter
    position = trainer.position
    is_first, asked = not reader.has_begun, time.perf_counter()
    parts = range(run.config.gradient_accumulation_steps)
    batches = [reader.take("train", position.epoch, position.step, part) for part in parts]
    waited_s = time.perf_counter() - asked
    for batch in batches:
        meter.unreadable.update(batch.unreadable)
    inputs = trainer.prepare(batches, others=[float(_is_asked_to_stop(run)), *run.results.report(keep=1)])
    if is_first:
        meter.start_s += waited_s
        asked += waited_s
    else:
        meter.data_s += waited_s
    meter.seconds += time.perf_counter() - asked
    return inputs


def _is_asked_to_stop(run: _TrainingRun) -> bool:
    """Report progress and return True if the command has asked to stop, possibly a few steps late."""
    if run.crew.rank != 0:
        return False
    return run.crew.is_asked_to_stop(lambda: _progress(run))


def _progress(run: _TrainingRun, *, validated: float | None = None) -> WorkerProgress:
    """Return the progress to show, without waiting for the device.

    Args:
        run: The run.
        validated: Completed share of the validation, while it runs.
    """
    position, meter, num_steps = run.trainer.position, run.trainer.meter, run.plan.steps_per_epoch
    is_validating = validated is not None
    return WorkerProgress(
        epoch=position.epoch + 1,
        step=position.step,
        num_steps=num_steps,
        num_images=run.plan.num_validated if is_validating else run.plan.num_train,
        share_done=validated if validated is not None else position.step / num_steps,
        is_validating=is_validating,
        data_share=meter.data_s / max(meter.seconds, 1e-9),
        loss=run.recent_loss.value,
        memory_mb=_peak_memory_mb(),
        device_memory_mb=_peak_device_memory_mb(run.trainer.device),
    )


def _peak_memory_mb() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def _peak_device_memory_mb(device: torch.device) -> float | None:
    return torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None


def _agree(run: _TrainingRun, inputs: StepInputs) -> bool:
    """Conclude an earlier step, whose results came with the inputs; return True if all ranks must stop now."""
    with run.trainer.meter.communicating():
        num_stopping, *sums = inputs.others
    _conclude(run, run.results.conclude(sums))
    return num_stopping > 0


def _settle(run: _TrainingRun, inputs: StepInputs | None) -> None:
    """Conclude all steps taken so far. Collective: every rank must call it.

    Args:
        run: The run.
        inputs: The next step, if it has been prepared.
    """
    if inputs is not None:
        _agree(run, inputs)
    while len(run.results):
        _conclude(run, run.results.conclude(run.crew.all_sum(run.results.report(keep=0))))


def _conclude(run: _TrainingRun, result: LateResult | None) -> None:
    """Record a step whose results all ranks know."""
    if result is None:
        return
    outcome, values, position, meter = result.outcome, result.values, result.outcome.position, run.trainer.meter
    global_step = position.epoch * run.plan.steps_per_epoch + position.step
    run.watch.add(_report_skipped(run, result) if result.is_skipped else None)
    if result.is_skipped:
        scalars = {"step/skipped": 1.0}
    else:
        meter.gradient_norm += values.gradient_norm
        scalars = {"step/loss": result.loss, "step/gradient_norm": values.gradient_norm, **outcome.learning_rates}
        run.recent_loss.add(result.loss)
        if run.crew.rank == 0:
            job_metrics.step_finished(position.epoch + 1, result.loss)
    if run.tracker is not None and (result.is_skipped or global_step % _STEPS_BETWEEN_LOGS == 0):
        run.tracker.scalars(global_step + 1, scalars)


def _report_skipped(run: _TrainingRun, result: LateResult) -> SkippedStep:
    """Record and report a skipped step. Collective: every rank must call it."""
    outcome, meter = result.outcome, run.trainer.meter
    ranks = run.crew.exchange((outcome.read_terms(), outcome.image_ids))
    epoch, step = outcome.position.epoch + 1, outcome.position.step + 1
    skipped = skipped_step(epoch, step, ranks, loss_scale=result.values.loss_scale or None)
    _LOG.warning(skipped.line())
    if meter.num_skipped < MOST_KEPT:
        run.crew.say(skipped.line())
    meter.add_skipped(skipped)
    return skipped


def _end_if_stuck(run: _TrainingRun, inputs: StepInputs | None) -> None:
    """End the run if too many steps in a row were skipped. Collective: every rank must call it.

    In fp16 the weights are probably sound, and the run resumes here. In other precisions they give no finite gradient,
    so that the run resumes from a state before the first of these steps.

    Raises:
        WorkerFailed: As described; raised on all ranks.
    """
    if not run.watch.is_stuck:
        return
    row = list(run.watch.row)
    if run.trainer.settings.precision == "fp16":
        _save_state(run, inputs)
        run.saver.wait()
    elif run.crew.rank == 0:
        run.saver.wait()
        discard_states(run.config.out, since=Position(row[0].epoch - 1, row[0].step - 1))
    run.crew.share(None)  # the first rank to raise ends the run
    raise too_many_skipped(row, run.trainer.settings)


def _stop(run: _TrainingRun, inputs: StepInputs) -> bool:
    """Save the state and report the last step; return False."""
    _save_state(run, inputs)
    run.saver.wait()
    position, num_steps = run.trainer.position, run.plan.steps_per_epoch
    if position.step:
        record = _record_of_steps(run)
        if run.crew.rank == 0:
            write_stopped_epoch(run.config.out, record)
    if position.step == 0 and position.epoch > 0:
        position = Position(position.epoch - 1, num_steps)
    run.crew.show(position.epoch, position.step, num_steps)
    return False


def _step(run: _TrainingRun, inputs: StepInputs) -> StepOutcome:
    try:
        return run.trainer.step(inputs)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        batches = inputs.batches.use()
        largest = max((size_hw for batch in batches for size_hw in batch.sizes_hw), default=(0, 0))
        most = max(len(batch) for batch in batches)
        raise out_of_memory(run.trainer.position, run.config, num_images=most, size_hw=largest) from error


def _finish_epoch(run: _TrainingRun, reader: BatchReader) -> bool:
    """Validate, add the epoch to the history, and save; return False if the command asked to stop."""
    trainer, plan, crew, epoch = run.trainer, run.plan, run.crew, run.trainer.position.epoch
    record = _record_of_steps(run)
    model: list[Write] = []
    with trainer.averaged():
        validation = None
        if plan.validates(epoch):
            with merged(trainer.detector.model):
                validation = validate(
                    trainer,
                    crew,
                    plan,
                    reader,
                    tracker=run.tracker,
                    progress=lambda share: _progress(run, validated=share),
                )
        is_to_stop = plan.validates(epoch) and validation is None
        if not is_to_stop:
            record = replace(record, validation=validation)
            trainer.end_epoch(record)
            if crew.rank == 0:
                model = run.saver.model(trainer.detector, trainer.history, trainer.position)
    _save_state(run, None, after=model)
    if is_to_stop:  # the state is that after the epoch's last step, so that a resumed run starts with the validation
        run.saver.wait()
        crew.show(epoch, plan.steps_per_epoch, plan.steps_per_epoch)
        return False
    if run.tracker is not None:
        run.tracker.scalars((epoch + 1) * plan.steps_per_epoch, scalars_of(record))
        run.tracker.flush()
    if crew.rank == 0:
        job_metrics.epoch_validated(record.value("AP"))
    crew.announce(record)
    crew.report({"epoch": record.epoch})
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
        on_device = _peak_device_memory_mb(trainer.device)
        record = replace(
            epoch_record(merge_states(states), epoch=epoch, learning_rate=learning_rate),
            overrides=tuple(one for one in run.overrides if one.epoch == epoch - 1),
            peak_memory_mb=round(_peak_memory_mb()),
            peak_device_memory_mb=None if on_device is None else round(on_device),
            num_trained_parameters=num_trained(trainer.detector.model),
        )
    shared: EpochRecord = crew.share(record)
    return shared


def _save_state(run: _TrainingRun, inputs: StepInputs | None, *, after: Sequence[Write] = ()) -> None:
    """Hand a state to resume from to the thread that writes it. Collective: every rank must call it.

    Args:
        run: The run.
        inputs: The next step, if it has been prepared.
        after: Writes to perform before the state is written.
    """
    _settle(run, inputs)
    own = run.trainer.state_dict()
    locals_of_ranks = run.crew.gather({"meter": own["meter"], "buffers": own["buffers"]})
    if locals_of_ranks is not None:
        state = TrainingState.of_ranks(own, locals_of_ranks)
        # The state before skipped steps may be the only useful one.
        run.saver.save(state, run.trainer.history, after=after, keeps_all=bool(run.watch.row))

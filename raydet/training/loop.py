"""The training loop, as it runs on every worker, CPU or GPU, one or many.

Rank 0 starts the stream of the run, every rank reads its part of it, and gradients, losses and detections are put
together over all ranks. The loop itself is `run_worker`; below it stand its steps, in the order in which it takes them.
"""

import errno
import json
import logging
import resource
import sys
import tempfile
import time
from datetime import datetime
from typing import Any

import numpy as np
import ray
import ray.train
import torch
import torch.distributed as dist
from ray.data import ExecutionResources
from ray.train.collective import broadcast_from_rank_zero
from torch import Tensor

from raydet.augmentation.view import View
from raydet.cluster import job_metrics
from raydet.cluster.shares import Resources, cpus_for_tasks
from raydet.config import TrainConfig
from raydet.models.backbone import freeze_backbone
from raydet.models.checkpoints import HISTORY_FILE
from raydet.models.geometry import ResizeRule
from raydet.models.optim.schedules import after_validation
from raydet.models.processors import resize_rule_of, resized_processor
from raydet.models.step import StepResult, apply_gradients, compute_gradients
from raydet.tables import storage
from raydet.tables.table import Table
from raydet.training.history import is_best_so_far, is_over, metric_value
from raydet.training.meter import EpochMeter, merge_states, summary
from raydet.training.ordering import RunPlan
from raydet.training.state import Position, save_state
from raydet.training.stream import ReadyImage, micro_batches, run_stream
from raydet.training.tracking.trackers import RunTracker, scalars_of
from raydet.training.validation import validate
from raydet.training.worker import Stream, Worker, averaged, capture, examples_of, next_images, start_worker, wrap

_LOG = logging.getLogger(__name__)
_STEPS_BETWEEN_LOGS = 10
_STEPS_BETWEEN_LOOKS = 20
"""Steps after which the workers ask Ray whether a node of theirs is about to be taken away."""


def run_worker(job: dict[str, Any]) -> None:
    """The training loop, on every worker."""
    config, tables = TrainConfig(**job["config"]), job["tables"]
    plan = RunPlan.of_training(config, tables["train"], num_val=tables["validate"].num_rows)
    worker = start_worker(config, tables["train"].categories, plan, job["board"])
    if worker.position == Position(0, 0) and worker.detector.reinitialised:
        worker.say(f"these weights start anew: {', '.join(worker.detector.reinitialised)}")
    if worker.rank == 0:
        start_step = worker.position.epoch * plan.steps_per_epoch + worker.position.step
        worker.tracker = RunTracker(config.out, config.trackers, job["config"], start_step=start_step, warn=worker.say)
    view = View.of_training(config, worker.detector.resize_rule, _step_rules(worker))
    run = _Run(worker, plan, view, tables["train"], tables["validate"])
    if not run.is_over():
        stream = micro_batches(_open_stream(run, job["resources"]))
        while not run.is_over():
            if not run.train_epoch(stream):
                break
            run.finish_epoch(stream)
    if worker.rank == 0:
        _write_history(worker)  # a kill may have come after the last state and before the history was written
    if worker.tracker is not None:
        worker.tracker.close()


def _step_rules(worker: Worker) -> tuple[ResizeRule, ...]:
    """The sizes of which each step draws one; none when there is but the model's own."""
    detector = worker.detector
    return tuple(
        resize_rule_of(resized_processor(detector.processor, detector.family, size), where=worker.config.model)
        for size in worker.config.multi_scale or ()
    )


def _open_stream(run: "_Run", resources: Resources) -> Any:
    """Rank 0 starts the stream from where the run stands; every rank gets its part of it."""
    worker = run.worker
    reference = None
    if worker.rank == 0:
        iterators = run_stream(
            run.plan,
            train=run.train_table,
            val=run.val_table,
            view=run.view,
            world_size=worker.world_size,
            start_epoch=worker.position.epoch,
            start_step=worker.position.step,
            reserved=ExecutionResources(
                cpu=resources.cpus_per_worker * worker.world_size,
                gpu=float(worker.world_size) if resources.use_gpu else 0.0,
            ),
            cpus_per_task=cpus_for_tasks(resources),
        )
        reference = [ray.put(iterators)]
    return ray.get(broadcast_from_rank_zero(reference)[0])[worker.rank]


class _Run:
    """The epochs of a run, on one worker."""

    def __init__(self, worker: Worker, plan: RunPlan, view: View, train_table: Table, val_table: Table) -> None:
        self.worker, self.plan, self.view = worker, plan, view
        self.train_table, self.val_table = train_table, val_table
        self._is_first_step = True
        self._look: ray.ObjectRef[bool] | None = None
        self._has_saved_for_preemption = False

    def is_over(self) -> bool:
        """Whether no epoch is left, or none has got better for too long."""
        config = self.worker.config
        return is_over(
            self.worker.history,
            epochs=config.epochs,
            metric=config.metric_for_best_model,
            patience=config.early_stopping_patience,
        )

    def train_epoch(self, stream: Stream) -> bool:
        """Takes the optimizer steps that are left of the epoch; false when the run was asked to stop on the way."""
        worker, plan = self.worker, self.plan
        epoch = worker.position.epoch
        if worker.is_frozen and epoch + 1 >= (worker.config.unfreeze_epoch or 0):
            freeze_backbone(worker.detector.model, "none")
            worker.is_frozen = False
            wrap(worker)
            worker.say(f"the backbone learns from epoch {epoch + 1} on")
        worker.detector.model.train()
        for step in range(worker.position.step, plan.steps_per_epoch):
            is_to_stop = self._take_step(stream, epoch, step)
            worker.position = Position(epoch, step + 1)
            every = worker.config.save_every_steps
            if is_to_stop or (every and (step + 1) % every == 0 and step + 1 < plan.steps_per_epoch):
                self._save_state()
            if is_to_stop:
                worker.say(f"stopped after step {step + 1} of epoch {epoch + 1}, all of it saved")
                return False
        return True

    def _take_step(self, stream: Stream, epoch: int, step: int) -> bool:
        """One optimizer step; returns whether the run is to stop after it."""
        worker, config, meter = self.worker, self.worker.config, self.worker.meter
        asked = time.perf_counter()
        parts = [
            next_images(stream, "train", epoch, step, part, worker.rank)
            for part in range(config.gradient_accumulation_steps)
        ]
        started = time.perf_counter()
        if self._is_first_step:
            meter.start_s += started - asked
            asked = started
            self._is_first_step = False
        meter.data_s += started - asked
        meter.unreadable.update(image.image_id for part in parts for image in part if image.error)
        # Dropout and denoising draw from what (seed, epoch, step, rank) name, so that a resumed run goes on alike.
        torch.manual_seed(int(np.random.SeedSequence([config.seed, epoch, step, worker.rank]).generate_state(1)[0]))
        result = self._gradients(parts, epoch, step)
        if worker.world_size > 1:
            meter.communication_s += time.perf_counter() - worker.last_bucket.ready_at
        with meter.communicating():
            loss, is_to_stop = self._agree(result, parts, epoch, step)
        norm = apply_gradients(
            worker.module, worker.optimizer, max_grad_norm=config.max_grad_norm, scaler=worker.setting.scaler
        )
        learning_rates = {f"learning_rate/{group['name']}": group["lr"] for group in worker.optimizer.param_groups}
        worker.schedule.step()
        if worker.average is not None:
            worker.average.update(worker.detector.model)
        meter.add_losses(result.terms)
        norm_value = norm.item()
        meter.gradient_norm += norm_value if np.isfinite(norm_value) else 0.0  # fp16 overflows once in a while
        meter.num_steps += 1
        num_images = sum(len(part) for part in parts)
        meter.num_images += num_images
        meter.seconds += time.perf_counter() - asked
        job_metrics.step_taken(num_images)
        if worker.rank == 0:
            job_metrics.step_finished(epoch + 1, loss)
        global_step = epoch * self.plan.steps_per_epoch + step
        if worker.tracker is not None and global_step % _STEPS_BETWEEN_LOGS == 0:
            worker.tracker.scalars(
                global_step + 1, {"step/loss": loss, "step/gradient_norm": norm_value, **learning_rates}
            )
        return is_to_stop

    def _gradients(self, parts: list[list[ReadyImage]], epoch: int, step: int) -> StepResult:
        worker = self.worker
        rule = self.view.step_resize_rule(epoch, step)
        examples = [examples_of(part) for part in parts]
        try:
            return compute_gradients(worker.detector, worker.module, examples, worker.setting, rule=rule)
        except ValueError as error:
            if not any(text in str(error) for text in ("invalid numeric", "nan", "inf")):
                raise
            # Boxes or scores that are no numbers cannot even be matched with the truth; transformers refuses them.
            images = [image.image_id for part in parts for image in part]
            worker.fail(_not_a_number(epoch, step, ["the matching of boxes"], images), error)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            largest = max((example.image.shape[:2] for part in examples for example in part), default=(0, 0))
            worker.fail(
                f"out of memory in step {step + 1} of epoch {epoch + 1}: a worker had {max(map(len, examples))} images "
                f"at once of up to {largest[0]} × {largest[1]} pixels (--batch-size {worker.config.batch_size} over "
                f"{worker.world_size} workers, --gradient-accumulation-steps "
                f"{worker.config.gradient_accumulation_steps}); raise --gradient-accumulation-steps, switch on "
                "--gradient-checkpointing, or lower --image-size or --batch-size",
                error,
            )

    def _agree(self, result: StepResult, parts: list[list[ReadyImage]], epoch: int, step: int) -> tuple[float, bool]:
        """The loss of the global batch, and whether anyone has been asked to stop.

        Raises:
            RunError: On all ranks, when the loss of one is not a number.
        """
        worker = self.worker
        loss = float(torch.stack(list(result.terms.values())).sum())
        flags = torch.tensor([float(not np.isfinite(loss)), float(self._is_asked_to_stop(epoch, step)), loss])
        flags = flags.to(torch.float64)
        if worker.world_size > 1:
            dist.all_reduce(flags, group=worker.cpu_group)
        if flags[0] > 0:
            self._fail_for_loss(result.terms, parts, epoch, step)
        return float(flags[2]), bool(flags[1] > 0)

    def _fail_for_loss(self, terms: dict[str, Tensor], parts: list[list[ReadyImage]], epoch: int, step: int) -> None:
        bad = [name for name, value in terms.items() if not torch.isfinite(value)]
        gathered = self.worker.gather((bad, [image.image_id for part in parts for image in part])) or []
        names = sorted({name for names, _ in gathered for name in names})
        self.worker.fail(
            _not_a_number(epoch, step, names, [image for names, ids in gathered if names for image in ids])
        )

    def _is_asked_to_stop(self, epoch: int, step: int) -> bool:
        """Shows how far the run is and hears, some steps later, whether it is to stop; saves when a node goes."""
        worker = self.worker
        if step % _STEPS_BETWEEN_LOOKS == 0 and not self._has_saved_for_preemption:
            info = ray.train.get_preemption_info()
            if info is not None:
                self._has_saved_for_preemption = True
                self._save_state()
        if worker.rank != 0:
            return False
        if self._look is not None:
            ready, _ = ray.wait([self._look], timeout=0)
            if not ready:
                return False
            if ray.get(self._look):
                return True
        progress = {"epoch": epoch + 1, "step": step + 1, "num_steps": self.plan.steps_per_epoch}
        self._look = worker.board.show.remote(progress)
        return False

    def finish_epoch(self, stream: Stream) -> None:
        """Validates, enters the epoch into the history, and saves."""
        worker, plan, epoch = self.worker, self.plan, self.worker.position.epoch
        meter = worker.meter
        text = "epoch %d: %d images in %.1f s, of it %.1f s waiting for images, %.1f s for other workers"
        _LOG.info(text, epoch + 1, meter.num_images, meter.seconds, meter.data_s, meter.communication_s)
        learning_rate = worker.optimizer.param_groups[0]["lr"]
        states = worker.gather(worker.meter.to_state())
        entry = None
        if states is not None:
            ended = datetime.now().astimezone().isoformat(timespec="milliseconds")
            entry = {"epoch": epoch + 1, "ended": ended, **summary(merge_states(states), learning_rate)}
        entry = worker.share(entry)
        entry |= _memory(worker)
        with averaged(worker):
            if plan.validates(epoch):
                entry |= validate(worker, plan, stream, self.val_table.categories, epoch)
            worker.history.append(entry)
            after_validation(worker.schedule, metric_value(entry, worker.config.metric_for_best_model))
            if worker.rank == 0:
                self._writing(self._publish)
        worker.position, worker.meter = Position(epoch + 1, 0), EpochMeter()
        self._save_state()
        if worker.tracker is not None:
            worker.tracker.scalars((epoch + 1) * plan.steps_per_epoch, scalars_of(entry))
            worker.tracker.flush()
        if worker.rank == 0:
            job_metrics.epoch_validated(entry.get("AP"))
            worker.board.pin.remote(entry)
        ray.train.report(entry)

    def _publish(self) -> None:
        """Writes OUT/checkpoint if this epoch is the best so far, then OUT/last.

        The state comes after them: a kill between any two costs nothing, what the state does not know of is done
        again.
        """
        worker = self.worker
        out, history = worker.config.out, worker.history
        with tempfile.TemporaryDirectory(prefix="raydet-checkpoint-") as folder:
            worker.detector.save(folder)
            if is_best_so_far(history, worker.config.metric_for_best_model):
                storage.publish_folder(folder, storage.join(out, "checkpoint"))
            storage.publish_folder(folder, storage.join(out, "last"))

    def _save_state(self) -> None:
        """Writes a state to go on from; all ranks take part."""
        state = capture(self.worker)
        if state is not None:
            self._writing(lambda: save_state(self.worker.config.out, state, keep=self.worker.config.keep_states))
            self._writing(lambda: _write_history(self.worker))

    def _writing(self, write: Any) -> None:
        """Ends the run with a clear line when a checkpoint cannot be written."""
        worker = self.worker
        try:
            write()
        except OSError as error:
            reason = "the disk is full" if storage.has_code(error, errno.ENOSPC) else str(error)
            worker.fail(
                f"cannot write the checkpoint after step {worker.position.step} of epoch {worker.position.epoch + 1} "
                f"to {worker.config.out}: {reason}; what was saved before is whole, the same command goes on from "
                "there",
                error,
            )


def _not_a_number(epoch: int, step: int, terms: list[str], image_ids: list[int]) -> str:
    return (
        f"the loss is not a number in step {step + 1} of epoch {epoch + 1}: {', '.join(terms)}, with the images "
        f"{', '.join(map(str, image_ids))}; look at these, lower --learning-rate or --max-grad-norm, or use "
        "--precision fp32 or bf16"
    )


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        text in str(error) for text in ("can't allocate memory", "not enough memory", "out of memory")
    )


def _memory(worker: Worker) -> dict[str, float]:
    """Peak memory of rank 0's process and of its device, in MB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    result = {"peak_memory_mb": round(peak)}
    if worker.setting.device.type == "cuda":
        result["peak_device_memory_mb"] = round(torch.cuda.max_memory_allocated(worker.setting.device) / 2**20)
    shared: dict[str, float] = worker.share(result)
    return shared


def _write_history(worker: Worker) -> None:
    content = json.dumps(worker.history, indent=1)
    storage.write_bytes(storage.join(worker.config.out, HISTORY_FILE), content.encode())

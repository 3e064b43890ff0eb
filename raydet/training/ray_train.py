"""Workers through Ray Train: any number of them, on any number of nodes, replaced when they are lost.

After a worker's exception, Ray Train restarts all workers. It first passes the exception to callbacks in its
controller; an error raised by a callback ends the run immediately.
"""

import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import ray.train
from ray.train import ControllerError, TrainingFailedError
from ray.train.torch import TorchTrainer

from raydet.cluster import shares
from raydet.cluster.ray_internals import UserCallback
from raydet.common.errors import RunError
from raydet.config import TrainConfig
from raydet.tables import storage
from raydet.training.crew import Crew
from raydet.training.failure import WorkerFailed, WorkerFailure


class EndRunOnFailure(UserCallback):
    """Callback that makes Ray Train's controller end the run after a `WorkerFailed` instead of restarting workers."""

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, BaseException]) -> None:
        """Raise the `WorkerFailed` of the lowest rank, if any."""
        for _, error in sorted(worker_exceptions.items()):
            if isinstance(error, WorkerFailed):
                raise error


def fit(
    run: Callable[[dict[str, Any], Crew], None], job: dict[str, Any], config: TrainConfig, resources: shares.Resources
) -> WorkerFailure | None:
    """Run the workers until they finish; return the failure that ended the run, if any.

    Args:
        run: Function that each worker calls.
        job: Its first argument.
        config: Configuration of the run.
        resources: Resources of each worker.

    Raises:
        RunError: Workers failed more than `max_failures` times.
    """
    fewest, most = config.min_workers, config.max_workers
    num_workers = most if fewest == most else (fewest, most)
    trainer = TorchTrainer(
        _run_as_member,
        train_loop_config={"run": run, "job": job},
        scaling_config=ray.train.ScalingConfig(
            num_workers=num_workers,  # type: ignore[arg-type]  # typed in the base class, for another scheduler
            use_gpu=resources.use_gpu,
            resources_per_worker={"CPU": resources.cpus_per_worker, **({"GPU": 1} if resources.use_gpu else {})},
        ),
        # raydet writes its own checkpoints, OUT/last and OUT/checkpoint; Ray stores only its bookkeeping here.
        run_config=ray.train.RunConfig(
            storage_path=storage.join(config.out, "log", "ray"),
            name=f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}",
            callbacks=[EndRunOnFailure()],  # type: ignore[list-item]  # typed in the base class, for another callback
            # Ray Train counts a controller failure for each minute in which the workers find no room, even while an
            # autoscaler waits for a machine, which may take hours for a spot machine: no limit (-1).
            failure_config=ray.train.FailureConfig(  # type: ignore[call-arg]
                max_failures=config.max_failures, controller_failure_limit=-1
            ),
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        cause = error.controller_failure if isinstance(error, ControllerError) else None
        if isinstance(cause, WorkerFailed):
            return cause.failure
        reason = str(error).strip().splitlines()[-1]
        raise RunError(
            f"Ray Train gave up (--max-failures {config.max_failures}): {reason}; run the same command again to resume"
        ) from error
    return None


def _run_as_member(arguments: dict[str, Any]) -> None:
    job = arguments["job"]
    arguments["run"](job, Crew.of_ray_train(job["board"]))

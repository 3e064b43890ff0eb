"""Ray Train's side of a run: starting the workers, passing on a request to stop, collecting their failure."""

import dataclasses
import os
import threading
import time
from typing import Any

import ray

from raydet.cluster import shares
from raydet.common.errors import RunError
from raydet.common.signals import StopRequest
from raydet.config import TrainConfig
from raydet.tables import storage
from raydet.tables.table import Table
from raydet.training.failure import EndRunOnFailure, WorkerFailure, failed, failure_of

_GROUP_FILE = ("log", "placement_group")
"""File in the run folder, present while the workers run."""
_STOP_POLL_S = 0.2


def free_workers(out: str) -> None:
    """Release the cluster resources of a run's workers after its own process has ended, for any reason."""
    note_uri = storage.join(out, *_GROUP_FILE)
    shares.free_noted_group(note_uri)
    storage.delete_file(note_uri)


def run_workers(
    config: TrainConfig, tables: dict[str, Table], resources: shares.Resources, board: Any, stop: StopRequest
) -> WorkerFailure | None:
    """Run the workers until they finish; return the failure with which one of them ended the run, if any.

    Args:
        config: Configuration of the run, with absolute URIs.
        tables: The tables `train` and `validate`.
        resources: Resources of each worker.
        board: Actor handle of a `raydet.cluster.board.Board`.
        stop: Request to stop; once set, the workers save their state and exit.

    Raises:
        RunError: Workers failed more than `max_failures` times.
        RunStopped: The request to stop arrived before the first step.
    """
    from ray.train import TrainingFailedError

    trainer = _trainer(config, tables, resources, board)
    try:
        if threading.current_thread() is threading.main_thread():
            _fit_in_thread(trainer, board, stop)
        else:
            trainer.fit()
    except TrainingFailedError as error:
        failure = failure_of(error)
        if failure is None:
            reason = str(error).strip().splitlines()[-1]
            raise RunError(
                f"Ray Train gave up (--max-failures {config.max_failures}): {reason}; "
                "run the same command again to resume"
            ) from error
        return failure
    return None


def _fit_in_thread(trainer: Any, board: Any, stop: StopRequest) -> None:
    """Run `fit` outside the main thread, where it would install its own SIGINT handler."""
    raised: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:  # re-raised in the main thread
            raised.append(error)

    thread = threading.Thread(target=fit, name="fit", daemon=True)
    thread.start()
    has_asked = False
    while thread.is_alive():
        thread.join(_STOP_POLL_S)
        if stop and not has_asked:
            has_asked = True
            if not ray.get(board.ask_to_stop.remote()):
                raise stop.to_error("run stopped before the first step; run the same command again to resume")
    if raised:
        raise raised[0]


def _trainer(config: TrainConfig, tables: dict[str, Table], resources: shares.Resources, board: Any) -> Any:
    import ray.train
    from ray.train.torch import TorchTrainer

    fewest, most = config.min_workers, config.max_workers
    num_workers = most if fewest == most else (fewest, most)
    return TorchTrainer(
        _run_worker,
        train_loop_config={
            "config": dataclasses.asdict(config),
            "tables": tables,
            "resources": resources,
            "board": board,
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=num_workers,  # type: ignore[arg-type]  # typed in the base class, for another scheduler
            use_gpu=resources.use_gpu,
            resources_per_worker={"CPU": resources.cpus_per_worker, **({"GPU": 1} if resources.use_gpu else {})},
        ),
        # raydet writes its own checkpoints, OUT/last and OUT/checkpoint; Ray stores only bookkeeping here.
        run_config=ray.train.RunConfig(
            storage_path=storage.join(config.out, "log", "ray"),
            name=f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}",
            callbacks=[EndRunOnFailure()],  # type: ignore[list-item]  # typed in the base class, for another callback
            # Ray Train counts a controller failure for each minute in which the workers find no room, also while an
            # autoscaler waits for a machine, which may take hours for a spot machine: no limit (-1).
            failure_config=ray.train.FailureConfig(  # type: ignore[call-arg]
                max_failures=config.max_failures, controller_failure_limit=-1
            ),
        ),
    )


def _run_worker(job: dict[str, Any]) -> None:
    import ray.train

    if ray.get(job["board"].show.remote()):
        return  # stop requested before the first step

    from raydet.training.loop import run_worker

    out = job["config"]["out"]
    if ray.train.get_context().get_world_rank() == 0:
        shares.note_own_group(storage.join(out, *_GROUP_FILE))
    try:
        run_worker(job)
    except Exception as error:
        failure = failed(error, out)
        if failure is None:
            raise
        raise failure from error

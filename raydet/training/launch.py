"""Ray Train's side of a run: starts the workers, passes on a request to stop, and hears how they ended."""

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
from raydet.training.failure import EndForGood, WorkerFailure, failed, failure_of

_MINUTES_WAITED_FOR_ROOM = 15
"""Ray Train gives up once a minute when there is no room for all workers; a cloud may need several for a machine."""
_GROUP_FILE = ("log", "placement_group")
"""In the run folder, while its workers are at work."""
_SECONDS_BETWEEN_LOOKS = 0.2


def free_workers(out: str) -> None:
    """Gives back to the cluster what the workers of a run hold whose own process has ended, however that came about."""
    note_uri = storage.join(out, *_GROUP_FILE)
    shares.free_noted_group(note_uri)
    storage.delete_file(note_uri)


def run_workers(
    config: TrainConfig, tables: dict[str, Table], resources: shares.Resources, board: Any, stop: StopRequest
) -> WorkerFailure | None:
    """Runs the workers to their end; returns the failure with which one of them ended the run.

    Args:
        config: Of the run, with absolute URIs.
        tables: `train` and `validate`.
        resources: What each worker gets.
        board: See `raydet.cluster.board.Board`.
        stop: Once noted, the workers save what they have and end.

    Raises:
        RunError: They have died more often than they may.
        RunStopped: The request to stop came before their first step.
    """
    from ray.train import TrainingFailedError

    trainer = _trainer(config, tables, resources, board)
    try:
        if threading.current_thread() is threading.main_thread():
            _fit_beside(trainer, board, stop)
        else:
            trainer.fit()
    except TrainingFailedError as error:
        failure = failure_of(error)
        if failure is None:
            reason = str(error).strip().splitlines()[-1]
            raise RunError(
                f"the workers have died too often: {reason}; run the same command again to resume"
            ) from error
        return failure
    return None


def _fit_beside(trainer: Any, board: Any, stop: StopRequest) -> None:
    """Runs `fit` in another thread than this, the main one, in which it would put a SIGINT handler of its own."""
    raised: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:  # handed on, whatever it is
            raised.append(error)

    thread = threading.Thread(target=fit, name="fit", daemon=True)
    thread.start()
    has_asked = False
    while thread.is_alive():
        thread.join(_SECONDS_BETWEEN_LOOKS)
        if stop and not has_asked:
            has_asked = True
            if not ray.get(board.ask_to_stop.remote()):
                raise stop.to_error("stopped before the first step; run the same command again to resume")
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
            num_workers=num_workers,  # type: ignore[arg-type]  # the base class's type, of another scheduler
            use_gpu=resources.use_gpu,
            resources_per_worker={"CPU": resources.cpus_per_worker, **({"GPU": 1} if resources.use_gpu else {})},
        ),
        # The checkpoints are raydet's own, in OUT/last and OUT/checkpoint; Ray keeps only its notes here.
        run_config=ray.train.RunConfig(
            storage_path=storage.join(config.out, "log", "ray"),
            name=f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}",
            callbacks=[EndForGood()],  # type: ignore[list-item]  # the base class's type, of another callback
            failure_config=ray.train.FailureConfig(  # type: ignore[call-arg]
                max_failures=config.max_failures, controller_failure_limit=_MINUTES_WAITED_FOR_ROOM
            ),
        ),
    )


def _run_worker(job: dict[str, Any]) -> None:
    import ray.train

    if ray.get(job["board"].show.remote()):
        return  # asked to stop before anything was begun

    from raydet.training.loop import run_worker

    out = job["config"]["out"]
    if ray.train.get_context().get_world_rank() == 0:
        shares.note_own_group(storage.join(out, *_GROUP_FILE))
    try:
        run_worker(job)
    except Exception as error:
        for_good = failed(error, out)
        if for_good is None:
            raise
        raise for_good from error

"""Start the workers of a run, pass on a stop request, and collect their failure."""

import dataclasses
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import ray

from raydet.cluster import shares
from raydet.common.errors import RunError, first_line
from raydet.common.signals import StopRequest
from raydet.config import TrainConfig
from raydet.tables import storage
from raydet.tables.schema import Category
from raydet.tables.table import Table
from raydet.training.failure import WorkerFailed, WorkerFailure, failed
from raydet.training.feeding.mixture import Mixture
from raydet.training.recovery.overrides import Override

if TYPE_CHECKING:
    from raydet.training.crew import Crew
    from raydet.training.trainer import Trainer

_GROUP_FILE = ("log", "placement_group")
"""File in the run folder, present while the workers run."""
_STOP_POLL_S = 0.2


def free_workers(out: str) -> None:
    """Release the cluster resources that a run's workers still hold after its process has ended for any reason."""
    note_uri = storage.join(out, *_GROUP_FILE)
    shares.free_noted_group(note_uri)
    storage.delete_file(note_uri)


def run_workers(
    config: TrainConfig,
    tables: dict[str, Table | Mixture],
    categories: Sequence[Category],
    overrides: Sequence[Override],
    resources: shares.Resources,
    board: Any,
    stop: StopRequest,
    *,
    is_alone: bool,
    make_trainer: "Callable[..., Trainer] | None" = None,
) -> WorkerFailure | None:
    """Run the workers until they finish; return the failure that ended the run, if any.

    Args:
        config: Configuration of the run, with absolute URIs.
        tables: The tables `train` and `validate`.
        categories: The classes in the order of the model's indices.
        overrides: Settings that change in mid-run.
        resources: Resources of each worker.
        board: Actor handle of a `raydet.cluster.board.Board`.
        stop: Request to stop; once set, the workers save their state and exit.
        is_alone: True for a single worker on this machine, which needs neither Ray Train nor a process group.
        make_trainer: See `raydet.train`.

    Raises:
        RunError: Workers failed more than `max_failures` times.
        RunStopped: The request to stop arrived before the first step.
    """
    job = {
        "config": dataclasses.asdict(config),
        "tables": tables,
        "categories": tuple(categories),
        "overrides": tuple(overrides),
        "resources": resources,
        "board": board,
        "make_trainer": make_trainer,
    }

    def run() -> WorkerFailure | None:
        if is_alone:
            return _run_alone(job, config, resources)
        from raydet.training.ray_train import fit  # takes seconds to import

        return fit(_run_worker, job, config, resources)

    if threading.current_thread() is threading.main_thread():
        return _in_thread(run, board, stop)
    return run()


def _in_thread(run: Callable[[], WorkerFailure | None], board: Any, stop: StopRequest) -> WorkerFailure | None:
    """Run outside the main thread, where Ray Train would install its own SIGINT handler."""
    raised: list[BaseException] = []
    failures: list[WorkerFailure | None] = []

    def fit() -> None:
        try:
            failures.append(run())
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
    return failures[0]


@ray.remote
class _LoneWorker:
    """The only worker of a run."""

    def train(self, job: dict[str, Any]) -> None:
        from raydet.training.crew import Crew  # imports torch

        _run_worker(job, Crew.alone(job["board"], use_gpu=job["resources"].use_gpu))


def _run_alone(job: dict[str, Any], config: TrainConfig, resources: shares.Resources) -> WorkerFailure | None:
    """Run a single worker, and replace it after a failure, up to `max_failures` times."""
    options = {
        "num_cpus": resources.cpus_per_worker,
        "num_gpus": 1 if resources.use_gpu else 0,
        "scheduling_strategy": "DEFAULT",  # outside the placement group of a trial, which has no room for it
    }
    failures_left = config.max_failures
    while True:
        worker = _LoneWorker.options(**options).remote()  # type: ignore[attr-defined]
        try:
            ray.get(worker.train.remote(job))
            return None
        except ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, WorkerFailed):
                return cause.failure
            if not failures_left:
                raise RunError(
                    f"the worker failed more than --max-failures {config.max_failures} times: "
                    f"{first_line(cause or error, otherwise='no message')}; run the same command again to resume"
                ) from error
            failures_left -= 1
        finally:
            ray.kill(worker)


def _run_worker(job: dict[str, Any], crew: "Crew") -> None:
    if ray.get(job["board"].show.remote()):
        return  # stop requested before the first step

    from raydet.training.loop import run_worker

    out = job["config"]["out"]
    if crew.rank == 0:
        shares.note_own_group(storage.join(out, *_GROUP_FILE))
    try:
        run_worker(job, crew)
    except Exception as error:
        failure = failed(error, out)
        if failure is None:
            raise
        raise failure from error

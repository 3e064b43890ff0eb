"""`train()`: checks what it is given, starts the workers with Ray Train, and says where the results are.

It imports no torch, so that a mistake is told in a second; the loop of the workers is in `training_loop.py`.
"""

import contextlib
import dataclasses
import json
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import ray

from raydet.cluster import session, shares
from raydet.cluster.board import open_board
from raydet.cluster.caller import LOG_FILE
from raydet.cluster.job_record import JobRecord
from raydet.cluster.shared_storage import check_shared
from raydet.common.console import Console
from raydet.common.errors import RunError, RunStopped, UserError
from raydet.common.redaction import without_secrets
from raydet.config import TrainConfig, identity, to_yaml
from raydet.models.checkpoints import HISTORY_FILE, STATES_FOLDER, read_checkpoint
from raydet.models.families import family_of
from raydet.models.small import SMALL_MODELS
from raydet.tables import storage
from raydet.tables.output_folder import OutputFolder, open_folder
from raydet.tables.table import MANIFEST_NAME, Table, open_table
from raydet.training.history import best_entry, is_over

_MINUTES_WAITED_FOR_ROOM = 15
"""Ray Train gives up once a minute when there is no room for all workers; a cloud may need several for a machine."""
_FOLDERS = (STATES_FOLDER, "checkpoint", "last")
_GROUP_FILE = ("log", "placement_group")
"""In the run folder, while its workers are at work."""


@dataclass(frozen=True)
class TrainResult:
    """Where a run's results are.

    Attributes:
        out: The run folder.
        checkpoint: The best model, a Hugging Face model folder.
        history: One entry an epoch: losses, rates, speed and, where it was validated, the COCO numbers.
        metric: What the checkpoint is the best by.
        already_done: Nothing was left to do.
    """

    out: str
    checkpoint: str
    history: list[dict[str, Any]]
    metric: str = "AP"
    already_done: bool = False

    @property
    def best(self) -> dict[str, Any]:
        """The epoch that the checkpoint is of."""
        entry = best_entry(self.history, self.metric)
        assert entry is not None, "a finished run has an epoch"
        return dict(entry)

    def lines(self) -> list[str]:
        """A summary of the run, for the terminal."""
        best = self.best
        numbers = ", ".join(f"{name} {best[name]:.3f}" for name in ("AP", "AP50", "AP75") if best.get(name) is not None)
        first = ["nothing to do: this run is finished; raise --epochs to continue it"] if self.already_done else []
        return [
            *first,
            f"best: {numbers}, in epoch {best['epoch']} of {len(self.history)}",
            f"checkpoint: {self.checkpoint}",
        ]


def train(
    config: TrainConfig,
    *,
    console: Console | None = None,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
    wait_for_folder_s: float = 0.0,
) -> TrainResult:
    """Trains a detector; run again after a kill, it goes on where it was.

    Args:
        config: What to train.
        console: Where to say how far it is.
        on_epoch: Is given the entry of each epoch that ends, in a thread of its own.
        wait_for_folder_s: Time to wait for an earlier run to release the folder.

    Raises:
        UserError: Tables, model or run folder are not what they should be. Nothing has been written then.
    """
    console = console or Console()
    tables = _check_tables(config)
    out = storage.absolute_uri(config.out)
    # Workers have other working directories, and a run is the same whichever one it is started from.
    config = dataclasses.replace(
        config,
        out=out,
        train_data=tables["train"].uri,
        val_data=tables["validate"].uri,
        model=storage.absolute_uri(config.model) if storage.exists(config.model) else config.model,
    )
    with open_folder(out, command="train", tell=console.line, wait_s=wait_for_folder_s) as folder:
        return _train_into(folder, config, tables, console, on_epoch)


def _train_into(
    folder: OutputFolder,
    config: TrainConfig,
    tables: dict[str, Table],
    console: Console,
    on_epoch: Callable[[dict[str, Any]], None] | None,
) -> TrainResult:
    out, history = folder.uri, _check_run_folder(folder, config)
    checkpoint = folder.uri_of("checkpoint")
    if _is_finished(config, history) and storage.exists(storage.join(checkpoint, "config.json")):
        return TrainResult(
            out, checkpoint, history[: config.epochs], metric=config.metric_for_best_model, already_done=True
        )
    _check_recipe(config)
    if not history:
        _check_model(config)

    with session.session(storage.join(out, "log")):
        resources = shares.share_out(
            min_workers=config.min_workers,
            max_workers=config.max_workers,
            use_gpu=config.use_gpu,
            cpus_per_worker=config.cpus_per_worker,
        )
        _check_nodes(config)
        folder.begin(identity(config), folders=_FOLDERS)
        folder.write_bytes(to_yaml(config).encode(), "config.yaml")
        JobRecord.of_this_job().write(storage.join(out, "log"))
        console.line(
            f"{resources.describe(config.min_workers, config.max_workers)}. Ray log: "
            f"{storage.join(out, 'log', LOG_FILE)}"
        )
        if resources.notice:
            console.line(resources.notice)
        free_workers(out)
        board = open_board()
        with (
            _stopping_on_sigterm(board) as asked_to_stop,
            console.following_training(_reader(board, on_epoch), epochs=config.epochs),
        ):
            _fit(_trainer(config, tables, resources, board), board)
        free_workers(out)
        folder.check()
        mistake, failure = ray.get([board.mistake.remote(), board.failure.remote()])
        if mistake:
            if not history:
                folder.delete_file("config.yaml")
                folder.forget()
            raise UserError(mistake)
        if failure:
            raise RunError(failure)
    finished = _read_history(out)
    if asked_to_stop.is_set() and not _is_finished(config, finished):
        raise RunStopped(f"run stopped after {len(finished)} epochs; run the same command again to resume")
    return TrainResult(out, checkpoint, finished, metric=config.metric_for_best_model)


def check(config: TrainConfig, tables: dict[str, Table] | None = None) -> dict[str, Table]:
    """Finds the mistakes in a new run that can be found before any worker starts; its folder is not looked at.

    Args:
        config: What to train.
        tables: Its tables, where an earlier call has opened them.

    Returns:
        The tables of training and validation.

    Raises:
        UserError: Tables, model, schedule, augmentation or trackers are not what they should be.
    """
    tables = _check_tables(config, tables)
    _check_recipe(config)
    _check_model(config)
    return tables


def free_workers(out: str) -> None:
    """Gives back to the cluster what the workers of a run hold whose own process has ended, however that came about."""
    note_uri = storage.join(out, *_GROUP_FILE)
    shares.free_noted_group(note_uri)
    storage.delete_file(note_uri)


def _reader(
    board: Any, on_epoch: Callable[[dict[str, Any]], None] | None
) -> Callable[[int], tuple[list[dict[str, Any]], dict[str, Any]]]:
    """Reads the board, and passes on each epoch that it tells of."""

    def read(start: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        entries, progress = ray.get(board.read.remote(start))
        for entry in entries:
            if on_epoch is not None and "epoch" in entry:
                on_epoch(entry)
        return entries, progress

    return read


def _is_finished(config: TrainConfig, history: list[dict[str, Any]]) -> bool:
    return is_over(
        history,
        epochs=config.epochs,
        metric=config.metric_for_best_model,
        patience=config.early_stopping_patience,
    )


def _fit(trainer: Any, board: Any) -> None:
    """Runs the workers to their end.

    Raises:
        RunError: They have died more often than they may.
    """
    from ray.train import TrainingFailedError

    try:
        trainer.fit()
    except TrainingFailedError as error:
        if ray.get(board.failure.remote()):
            return
        reason = str(error).strip().splitlines()[-1]
        raise RunError(f"the workers have died too often: {reason}; run the same command again to resume") from error


@contextlib.contextmanager
def _stopping_on_sigterm(board: Any) -> Iterator[threading.Event]:
    """For the time of a `with`, SIGTERM has the workers save what they have and end; yields whether it came."""
    asked, is_over = threading.Event(), threading.Event()
    if threading.current_thread() is not threading.main_thread():  # signals are for the main thread alone
        yield asked
        return

    def pass_on() -> None:
        asked.wait()
        if not is_over.is_set():
            ray.get(board.ask_to_stop.remote())

    previous = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    thread = threading.Thread(target=pass_on, daemon=True)
    thread.start()
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, previous)
        is_over.set()
        was_asked = asked.is_set()
        asked.set()  # lets the thread end
        thread.join(timeout=10)
        if not was_asked:
            asked.clear()


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
            failure_config=ray.train.FailureConfig(  # type: ignore[call-arg]
                max_failures=config.max_failures, controller_failure_limit=_MINUTES_WAITED_FOR_ROOM
            ),
        ),
    )


_BUGS = (AssertionError, AttributeError, LookupError, NameError, NotImplementedError, TypeError, ValueError)
"""What would come again if the workers were started again, unlike the death of another worker or a broken network."""


def _run_worker(job: dict[str, Any]) -> None:
    import ray.train

    board = job["board"]
    if ray.get(board.failure.remote()):
        return  # started anew after a failure that would come again

    from raydet.training.loop import run_worker

    if ray.train.get_context().get_world_rank() == 0:
        shares.note_own_group(storage.join(job["config"]["out"], *_GROUP_FILE))
    try:
        run_worker(job)
    except UserError as error:
        # Every worker builds the same model and finds the same mistake: no use in starting them again.
        ray.get(board.report_mistake.remote(str(error)))
    except _BUGS as error:
        log = storage.join(job["config"]["out"], "log", "error.log")
        storage.write_bytes(log, without_secrets(traceback.format_exc()).encode())
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no message"
        line = f"a worker came upon what it cannot handle ({type(error).__name__}: {reason}); {log} has the traceback"
        ray.get(board.report_failure.remote(line))
        raise


def _check_tables(config: TrainConfig, opened: dict[str, Table] | None = None) -> dict[str, Table]:
    uris = {"train": config.train_data, "validate": config.val_data}
    tables = {
        name: opened[name] if opened and opened[name].uri == storage.absolute_uri(uri) else open_table(uri, "images")
        for name, uri in uris.items()
    }
    for option, table in zip(("train-data", "val-data"), tables.values(), strict=True):
        if table.num_rows == 0:
            raise UserError(f"--{option} {table.uri} has no image")
        if not table.categories:
            raise UserError(f"--{option} {table.uri} has no classes: it was prepared without labels")
    names = {key: [category.name for category in table.categories] for key, table in tables.items()}
    if names["train"] != names["validate"]:
        raise UserError(
            f"the classes of --train-data ({', '.join(names['train'])}) and --val-data "
            f"({', '.join(names['validate'])}) differ; prepare both from annotations with the same list of categories"
        )
    metric = config.metric_for_best_model
    if metric.startswith("AP:") and metric.removeprefix("AP:") not in names["train"]:
        raise UserError(
            f"--metric-for-best-model {metric}: there is no such class; there are {', '.join(names['train'])}"
        )
    return tables


def _check_nodes(config: TrainConfig) -> None:
    """Makes sure that every node sees the tables, the model and the run folder."""
    reads = {
        "--train-data": (config.train_data, storage.join(config.train_data, MANIFEST_NAME)),
        "--val-data": (config.val_data, storage.join(config.val_data, MANIFEST_NAME)),
    }
    if storage.exists(storage.join(config.model, "config.json")):  # or it is a small model, or a name on the Hub
        reads["--model"] = (config.model, storage.join(config.model, "config.json"))
    check_shared(reads=reads, writes=(config.out, storage.join(config.out, "log")))


def _check_run_folder(folder: OutputFolder, config: TrainConfig) -> list[dict[str, Any]]:
    """Reads the history of the run in the folder, empty if there is none; refuses another run's folder."""
    # A run that ended before its first checkpoint has left nothing that other settings could spoil.
    folder.admit(identity(config), folders=_FOLDERS, is_disposable=not folder.list_files(STATES_FOLDER))
    for name in ("last", "checkpoint"):
        storage.recover_folder(folder.uri_of(name))
    return _read_history(folder.uri)


def _read_history(out: str) -> list[dict[str, Any]]:
    path = storage.join(out, HISTORY_FILE)
    if not storage.exists(path):
        return []
    history: list[dict[str, Any]] = json.loads(storage.read_bytes(path))
    return history


def _check_recipe(config: TrainConfig) -> None:
    """What can be told of schedule, augmentation and trackers before any worker starts."""
    from raydet.models.optim.schedules import check_schedule
    from raydet.training.tracking.trackers import check_trackers

    check_schedule(config)
    check_trackers(config.trackers)
    if not isinstance(config.augmentation, str):
        from raydet.augmentation.transforms import check_augmentation

        check_augmentation(config.augmentation)


def _check_model(config: TrainConfig) -> None:
    """What can be told of a model without loading torch; the workers find the rest."""
    if config.model in SMALL_MODELS:
        model_type = SMALL_MODELS[config.model].model_type
    else:
        model_type = read_checkpoint(config.model).model_type
    multiple = family_of(model_type, where=config.model).side_multiple
    for option, sizes in (("image_size", [config.image_size or multiple]), ("multi_scale", config.multi_scale or [])):
        for size in sizes:
            if size % multiple:
                raise UserError(f"{option} must be a multiple of {multiple} for {config.model}, got {size}")

"""`train()`: checks what it is given, starts the workers with Ray Train, and says where the results are.

It imports no torch, so that a mistake is reported in a second; the loop of the workers is in `loop.py`.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray

from raydet.cluster import session, shares
from raydet.cluster.board import open_board
from raydet.cluster.caller import LOG_FILE
from raydet.cluster.job_record import JobRecord
from raydet.cluster.shared_storage import check_shared
from raydet.common.console import Console
from raydet.common.errors import UserError
from raydet.common.signals import noting_stop_requests
from raydet.config import TrainConfig, identity, to_yaml
from raydet.models.checkpoints import STATES_FOLDER, read_checkpoint
from raydet.models.families import family_of
from raydet.models.small import SMALL_MODELS
from raydet.tables import storage
from raydet.tables.output_folder import OutputFolder, open_folder
from raydet.tables.table import MANIFEST_NAME, Table, open_table
from raydet.training.history import EpochRecord, best_epoch, is_over, read_history
from raydet.training.launch import free_workers, run_workers
from raydet.training.progress import Entry, following

_FOLDERS = (STATES_FOLDER, "checkpoint", "last")


@dataclass(frozen=True)
class TrainResult:
    """Where a run's results are.

    Attributes:
        out: The run folder.
        checkpoint: The best model, a Hugging Face model folder.
        history: One record an epoch.
        metric: What the checkpoint is the best by.
        already_done: Nothing was left to do.
    """

    out: str
    checkpoint: str
    history: list[EpochRecord]
    metric: str = "AP"
    already_done: bool = False

    @property
    def best(self) -> EpochRecord:
        """The epoch that the checkpoint is of."""
        record = best_epoch(self.history, self.metric)
        assert record is not None, "a finished run has an epoch"
        return record

    def lines(self) -> list[str]:
        """A summary of the run, for the terminal."""
        best = self.best
        values = {name: best.value(name) for name in ("AP", "AP50", "AP75")}
        numbers = ", ".join(f"{name} {value:.3f}" for name, value in values.items() if value is not None)
        first = ["nothing to do: this run is finished; raise --epochs to continue it"] if self.already_done else []
        return [
            *first,
            f"best: {numbers}, in epoch {best.epoch} of {len(self.history)}",
            f"checkpoint: {self.checkpoint}",
        ]


def train(
    config: TrainConfig,
    *,
    console: Console | None = None,
    on_epoch: Callable[[EpochRecord], None] | None = None,
    wait_for_folder_s: float = 0.0,
) -> TrainResult:
    """Trains a detector; run again after a kill, it resumes.

    Args:
        config: What to train.
        console: Where to say how far it is.
        on_epoch: Is given the record of each epoch that ends, in a thread of its own.
        wait_for_folder_s: Time to wait for an earlier run to release the folder.

    Raises:
        UserError: Tables, model or run folder are not what they should be. Nothing has been written then.
        RunError: The run failed on its way.
        RunStopped: SIGINT or SIGTERM has come; everything is saved.
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
    on_epoch: Callable[[EpochRecord], None] | None,
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
        with noting_stop_requests() as stop, following(console, _reader(board, on_epoch), epochs=config.epochs):
            failure = run_workers(config, tables, resources, board, stop)
        free_workers(out)
        folder.check()
        if failure is not None:
            if failure.is_mistake and not history:
                folder.delete_file("config.yaml")
                folder.forget()
            raise failure.to_error()
        _, progress = ray.get(board.read.remote(0))
    finished = read_history(out)
    if stop and not _is_finished(config, finished):
        raise stop.to_error(
            "stopped after step {step} of epoch {epoch}, everything saved; run the same command again to resume".format(
                **progress
            )
        )
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


def _reader(
    board: Any, on_epoch: Callable[[EpochRecord], None] | None
) -> Callable[[int], tuple[list[Entry], dict[str, Any]]]:
    """Reads the board, and passes on each epoch that it tells of."""

    def read(start: int) -> tuple[list[Entry], dict[str, Any]]:
        entries, progress = ray.get(board.read.remote(start))
        for entry in entries:
            if on_epoch is not None and isinstance(entry, EpochRecord):
                on_epoch(entry)
        return entries, progress

    return read


def _is_finished(config: TrainConfig, history: list[EpochRecord]) -> bool:
    return is_over(
        history,
        epochs=config.epochs,
        metric=config.metric_for_best_model,
        patience=config.early_stopping_patience,
    )


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


def _check_run_folder(folder: OutputFolder, config: TrainConfig) -> list[EpochRecord]:
    """Reads the history of the run in the folder, empty if there is none; refuses another run's folder."""
    # A run that ended before its first checkpoint has left nothing that other settings could spoil.
    folder.admit(identity(config), folders=_FOLDERS, is_disposable=not folder.list_files(STATES_FOLDER))
    for name in ("last", "checkpoint"):
        storage.recover_folder(folder.uri_of(name))
    return read_history(folder.uri)


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
    for option, sizes in (("image-size", [config.image_size or multiple]), ("multi-scale", config.multi_scale or [])):
        for size in sizes:
            if size % multiple:
                raise UserError(f"--{option} must be a multiple of {multiple} for {config.model}, got {size}")

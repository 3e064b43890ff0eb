"""`train()`: check the config, start the workers, and return the results.

This module does not import torch, so that input errors are reported within a second. `loop.py` runs on the workers.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import ray

from raydet.cluster import session, shares
from raydet.cluster.board import open_board
from raydet.cluster.caller import LOG_FILE
from raydet.cluster.job_record import JobRecord
from raydet.cluster.shared_storage import check_shared
from raydet.common.class_names import check_mapping, is_unused, match_names
from raydet.common.console import Console
from raydet.common.errors import UserError
from raydet.common.notebook.showing import Shown
from raydet.common.packages import require_packages
from raydet.common.ray_address import announce, is_connected, starts_cluster
from raydet.common.signals import noting_stop_requests
from raydet.config import OVERRIDABLE, ResolvedTrainConfig, TrainConfig, identity
from raydet.config.fields import flag, with_options
from raydet.models.checkpoints import ADAPTER_FOLDER, STATES_FOLDER, Checkpoint, read_checkpoint
from raydet.models.families import check_adaptable, family_of
from raydet.models.recipes.facts import check_side
from raydet.models.recipes.resolve import LOW_AP, Begun, Resolved, begun_values, resolve
from raydet.models.small import SMALL_MODELS
from raydet.tables import storage
from raydet.tables.layout import MANIFEST_NAME
from raydet.tables.output_folder import OutputFolder, RunRecord, open_folder
from raydet.tables.schema import Category
from raydet.tables.table import Table
from raydet.training.feeding.counts import lines_of, record_of, shown_of
from raydet.training.feeding.mixture import Mixture, images_per_epoch
from raydet.training.feeding.sources import open_renamed, open_sources, weighted, with_absolute_sources
from raydet.training.history import EpochRecord, History, best_epoch, is_over, read_history
from raydet.training.progress import Entry, WorkerProgress, following
from raydet.training.recovery.overrides import (
    extended,
    given_settings,
    overrides_of,
    overrides_to_json,
    with_latest,
)

if TYPE_CHECKING:
    from raydet.engines.in_memory.loaded import LoadedModel
    from raydet.training.trainer import Trainer

_FOLDERS = (STATES_FOLDER, "checkpoint", "last", ADAPTER_FOLDER)
_SHOWN_FILE = "training_data.json"
"""File of the folder `log` with what an epoch shows of each table."""
_SOURCES = "recipe"
"""Key of the run's record: where each value that a recipe may decide comes from."""
_TABLES = "tables"
"""Another: fingerprints of the images tables."""


@dataclass(frozen=True)
class TrainResult(Shown):
    """Results of a training run.

    Attributes:
        out: URI of the run folder.
        checkpoint: URI of the best model, a Hugging Face model folder.
        adapter: URI of the adapters that are merged into it, in peft's format; None without `lora`.
        history: One record per epoch; `history.to_pandas()` is a table of them.
        metric: Metric that selects the best model.
        already_done: True if the run was already finished.
        advice: Advice for a model from scratch, in case that its AP is low; empty for a pretrained one.
    """

    out: str
    checkpoint: str
    history: History
    metric: str = "AP"
    already_done: bool = False
    advice: str = ""
    adapter: str | None = None

    json_properties: ClassVar = ("best",)

    @property
    def best(self) -> EpochRecord:
        """The epoch of the checkpoint."""
        record = best_epoch(self.history, self.metric)
        assert record is not None, "a finished run has at least one epoch"
        return record

    def plot(self) -> Any:
        """Return a Plotly figure of the losses and the AP by epoch; a notebook shows it."""
        return self.history.plot()

    def load(self, **options: Any) -> "LoadedModel":
        """Load the best model for images in memory, with the options of `raydet.load`."""
        from raydet.engines.in_memory.loaded import load  # imports torch

        return load(self.checkpoint, **options)

    def lines(self) -> list[str]:
        """Return a summary of the run for the terminal."""
        best = self.best
        values = {name: best.value(name) for name in ("AP", "AP50", "AP75")}
        numbers = ", ".join(f"{name} {value:.3f}" for name, value in values.items() if value is not None)
        first = ["nothing to do: this run is finished; raise --epochs to train longer"] if self.already_done else []
        ap = values["AP"]
        last = [f"AP is low, {self.advice}"] if self.advice and ap is not None and ap < LOW_AP else []
        return [
            *first,
            f"best: {numbers} in epoch {best.epoch} of {len(self.history)}",
            f"checkpoint: {self.checkpoint}",
            *([f"adapter: {self.adapter}"] if self.adapter else []),
            *last,
        ]


@with_options(TrainConfig)
def train(
    config: TrainConfig,
    *,
    console: Console | None = None,
    on_epoch: Callable[[EpochRecord], None] | None = None,
    wait_for_folder_s: float = 0.0,
    make_trainer: "Callable[..., Trainer] | None" = None,
) -> TrainResult:
    """Train a detector. An interrupted run resumes when the function is called again with the same config.

    Args:
        config: Configuration of the run.
        console: Console for progress; by default a new one.
        on_epoch: Called with the record of each finished epoch, in a separate thread.
        wait_for_folder_s: Seconds to wait for an earlier run to release the folder.
        make_trainer: Builds the trainer in each worker, with the arguments of `Trainer`, which is the default; must be
            picklable.

    Raises:
        UserError: A table, the model, an option or the run folder is invalid; nothing has been written.
        RunError: The run failed.
        RunStopped: SIGINT or SIGTERM was received; everything is saved.
    """
    console = console or Console()
    changes = given_settings(config.override)
    # Workers have other working directories, and the identity of a run must not depend on the current directory.
    config = with_absolute_sources(config)
    tables = _check_tables(config)
    out = storage.absolute_uri(config.out)
    config = dataclasses.replace(
        config,
        out=out,
        model=storage.absolute_uri(config.model) if storage.exists(config.model) else config.model,
    )
    with open_folder(out, command="train", notify=console.line, wait_s=wait_for_folder_s) as folder:
        return _train_into(folder, config, changes, tables, console, on_epoch, make_trainer)


def _train_into(
    folder: OutputFolder,
    given: TrainConfig,
    changes: dict[str, Any],
    tables: dict[str, Table | Mixture],
    console: Console,
    on_epoch: Callable[[EpochRecord], None] | None,
    make_trainer: "Callable[..., Trainer] | None",
) -> TrainResult:
    out = folder.uri
    states, record = folder.list_files(STATES_FOLDER), folder.record()
    resolved = _resolve(given, tables, gpus=shares.gpus_in_reach, begun=_begun(record) if states else None)
    config, advice = resolved.config, resolved.advice
    # A run that stopped before its first state has left nothing worth protecting from other settings.
    history, classes = _check_run_folder(folder, config, tables["train"], is_disposable=not states)
    checkpoint, adapter = folder.uri_of("checkpoint"), folder.uri_of(ADAPTER_FOLDER) if config.lora else None
    if _is_finished(config, history) and storage.exists(storage.join(checkpoint, "config.json")):
        return TrainResult(
            out,
            checkpoint,
            History(history[: config.epochs]),
            metric=config.metric_for_best_model,
            already_done=True,
            advice=advice,
            adapter=adapter,
        )
    newest = _newest_position(states)
    overrides = extended(config, overrides_of(record, config), changes, newest or (0, 0))
    config = with_latest(config, overrides)
    _check_recipe(config)
    if not history:
        _check_model(config, classes)

    from raydet.training.launch import free_workers, run_workers  # imports torch, after all checks of the input

    # A single worker needs Ray Train only on a named cluster, to be told that its node is about to be reclaimed.
    is_alone = config.max_workers == 1 and (is_connected() or starts_cluster())
    announce(console.line)
    with session.session(storage.join(out, "log")):
        resources = shares.share_out(
            min_workers=config.min_workers,
            max_workers=config.max_workers,
            use_gpu=config.use_gpu,
            cpus_per_worker=config.cpus_per_worker,
        )
        _check_nodes(config)
        plan = {
            "classes": [item.name for item in classes],
            "overrides": overrides_to_json(overrides),
            _SOURCES: dict(resolved.sources),
            _TABLES: _fingerprints(tables),
        }
        folder.begin(identity(config), folders=_FOLDERS, plan=plan)
        folder.write_bytes(dataclasses.replace(resolved, config=config).to_yaml().encode(), "config.yaml")
        job = JobRecord.of_this_job(num_workers=config.max_workers, resources=resources)
        job.write(storage.join(out, "log"))
        console.line(
            f"{resources.describe(config.min_workers, config.max_workers)}. Ray log: "
            f"{storage.join(out, 'log', LOG_FILE)}"
        )
        if resources.notice:
            console.line(resources.notice)
        if isinstance(tables["train"], Mixture):
            shown, names = shown_of(tables["train"]), [category.name for category in tables["train"].categories]
            folder.write_bytes(json.dumps(record_of(tables["train"], shown), indent=1).encode(), "log", _SHOWN_FILE)
            for line in lines_of(shown, names):
                console.line(line)
        if unlabelled := _classes_without_truth(tables):
            console.line(f"no validation image can have these classes, which AP leaves out: {', '.join(unlabelled)}")
        if newest is not None:
            place = f"step {newest[1]} of epoch {newest[0] + 1}" if newest[1] else f"epoch {newest[0]}"
            console.line(f"resuming after {place} of {config.epochs}")
            for name in _rewritten(tables, record):
                option = flag(f"{name}_data")
                console.line(f"{option} has been written again since the run began, which goes on with the new images")
        else:
            for line in resolved.lines:
                console.line(line)
        for override in overrides:
            console.line(override.line())
        free_workers(out)
        board = open_board()
        reader, metric = _reader(board, on_epoch), config.metric_for_best_model
        with noting_stop_requests() as stop, following(console, reader, epochs=config.epochs, metric=metric):
            failure = run_workers(
                config, tables, classes, overrides, resources, board, stop, is_alone=is_alone, make_trainer=make_trainer
            )
        free_workers(out)
        folder.check()
        job.with_joined_nodes().write(storage.join(out, "log"))
        if failure is not None:
            if failure.is_user_error and not history:
                folder.delete_file("config.yaml")
                folder.forget()
            raise failure.to_error()
        _, progress = ray.get(board.read.remote(0))
    finished = read_history(out)
    if stop:
        # Also if the request came during the last step: a caller with further steps, such as a loop, must end too.
        raise stop.to_error(
            "run stopped after the last epoch, the training is finished; run the same command again for its result"
            if _is_finished(config, finished)
            else f"run stopped after step {progress.step} of epoch {progress.epoch}, state saved; run the same command "
            "again to resume"
        )
    return TrainResult(out, checkpoint, finished, metric=metric, advice=advice, adapter=adapter)


def check(config: TrainConfig, tables: dict[str, Table | Mixture] | None = None) -> dict[str, Table | Mixture]:
    """Check a new run, except its folder, before any worker starts.

    Args:
        config: Configuration of the run.
        tables: Tables opened by an earlier call, to reuse.

    Returns:
        The tables `train` and `validate`.

    Raises:
        UserError: A table, the model, the schedule, the augmentation or a tracker is invalid.
    """
    if config.override:
        raise UserError("--override changes a run that has begun; give each option its value instead")
    tables = _check_tables(config, tables)
    resolved = _resolve(config, tables, gpus=lambda: 0).config
    _check_recipe(resolved)
    _check_model(resolved, tables["train"].categories)
    return tables


def resolved_yaml(config: TrainConfig) -> str:
    """Format the config that a run would have as YAML, with the source of each value that a recipe decides.

    Raises:
        UserError: A table or the model is invalid.
    """
    return _resolve(config, _check_tables(config), gpus=shares.gpus_in_reach).to_yaml()


def _resolve(
    config: TrainConfig, tables: dict[str, Table | Mixture], *, gpus: Callable[[], int], begun: Begun | None = None
) -> Resolved:
    return resolve(config, num_images=images_per_epoch(tables["train"]), gpus=gpus, begun=begun)


def _begun(record: RunRecord | None) -> Begun:
    """Return what the recipe decided when the recorded run began; empty if there is none, or it is no training."""
    if record is None or record.command != "train":
        return {}
    return begun_values(record.identity, record.plan.get(_SOURCES, {}))


def _fingerprints(tables: Mapping[str, Table | Mixture]) -> dict[str, list[str]]:
    """Return the fingerprints of the images tables of each split, in their order."""
    return {
        name: [source.table.fingerprint for source in table.sources]
        if isinstance(table, Mixture)
        else [table.fingerprint]
        for name, table in tables.items()
    }


def _rewritten(tables: Mapping[str, Table | Mixture], record: RunRecord | None) -> list[str]:
    """Return the splits whose tables are others than when the recorded run last started."""
    begun = {} if record is None else record.plan.get(_TABLES, {})
    return [name for name, own in _fingerprints(tables).items() if begun.get(name, own) != own]


def _reader(
    board: Any, on_epoch: Callable[[EpochRecord], None] | None
) -> Callable[[int], tuple[list[Entry], WorkerProgress | None]]:
    """Return a function that reads the board and calls `on_epoch` with each finished epoch."""

    def read(start: int) -> tuple[list[Entry], WorkerProgress | None]:
        entries, progress = ray.get(board.read.remote(start))
        for entry in entries:
            if on_epoch is not None and isinstance(entry, EpochRecord):
                on_epoch(entry)
        return entries, progress

    return read


def _newest_position(states: Sequence[str]) -> tuple[int, int] | None:
    """Return the next epoch and step, both from 0, of the newest state, by its file: EPOCH-STEP.pt."""
    matches = [match for name in states if (match := re.fullmatch(r"(\d+)-(\d+)\.pt", name))]
    if not matches:
        return None
    epoch, step = map(int, matches[-1].groups())
    return epoch, step


def _is_finished(config: ResolvedTrainConfig, history: list[EpochRecord]) -> bool:
    return is_over(
        history,
        epochs=config.epochs,
        metric=config.metric_for_best_model,
        patience=config.early_stopping_patience,
    )


def _check_tables(config: TrainConfig, opened: dict[str, Table | Mixture] | None = None) -> dict[str, Table | Mixture]:
    wanted, train = with_absolute_sources(config), (opened or {}).get("train")
    further = wanted.rename_classes, wanted.repeat_rare, wanted.teacher
    if not isinstance(train, Table) or wanted.train_data != train.uri or further != (None, None, None):
        train = open_sources(wanted)
    validate = (opened or {}).get("validate")
    if validate is None or validate.uri != wanted.val_data:
        validate = open_renamed(wanted)
    if validate.num_rows == 0:
        raise UserError(f"--val-data {validate.uri} has no images")
    if not validate.categories:
        raise UserError(f"--val-data {validate.uri} has no classes: it was prepared without labels")
    tables = {"train": train, "validate": validate}
    names = {key: [category.name for category in table.categories] for key, table in tables.items()}
    places = match_names(names["validate"], names["train"])
    unknown = [
        name for index, name in enumerate(names["validate"]) if places[index] is None and not is_unused(name, index)
    ]
    if unknown and names["train"] != names["validate"]:
        raise UserError(
            f"--val-data has classes that --train-data ({', '.join(names['train'])}) lacks: {', '.join(unknown)}; "
            "prepare both from annotations with the same list of categories"
        )
    metric = config.metric_for_best_model
    if metric.startswith("AP:") and metric.removeprefix("AP:") not in names["train"]:
        raise UserError(
            f"--metric-for-best-model {metric}: there is no such class; the classes are {', '.join(names['train'])}"
        )
    return tables


def _classes_without_truth(tables: dict[str, Table | Mixture]) -> list[str]:
    """Return the classes of the training table that the validation table does not list."""
    train, validate = ([category.name for category in tables[name].categories] for name in ("train", "validate"))
    places = match_names(train, validate)
    return [] if train == validate else [name for name, place in zip(train, places, strict=True) if place is None]


def _check_nodes(config: TrainConfig) -> None:
    """Check that every node can access the tables, the model and the run folder."""
    reads = {
        "--train-data" if number == 0 else f"--train-data, table {number + 1}": (uri, storage.join(uri, MANIFEST_NAME))
        for number, (uri, _) in enumerate(weighted(config.train_data))
    }
    for uri, _ in weighted(config.teacher or [], "teacher"):
        reads[f"--teacher {uri}"] = (uri, storage.join(uri, MANIFEST_NAME))
    reads["--val-data"] = (config.val_data, storage.join(config.val_data, MANIFEST_NAME))
    if storage.exists(storage.join(config.model, "config.json")):  # else a small model or a Hub name
        reads["--model"] = (config.model, storage.join(config.model, "config.json"))
    check_shared(reads=reads, writes=(config.out, storage.join(config.out, "log")))


def _check_run_folder(
    folder: OutputFolder, config: TrainConfig, train_table: Table | Mixture, *, is_disposable: bool
) -> tuple[list[EpochRecord], tuple[Category, ...]]:
    """Check that the folder is new or belongs to this run; other settings may replace a disposable one.

    Returns:
        The run's history, empty if there is none, and its classes in the order of the model's indices: that of the
        training table when the run began.
    """
    record = folder.admit(
        identity(config),
        folders=_FOLDERS,
        is_disposable=is_disposable,
        remedy=f"choose another --out, change {', '.join(OVERRIDABLE)} with --override",
    )
    for name in ("last", "checkpoint", ADAPTER_FOLDER):
        storage.recover_folder(folder.uri_of(name))
    names = [category.name for category in train_table.categories]
    begun: list[str] = names if record is None else record.plan.get("classes", names)
    if sorted(begun) != sorted(names):
        raise UserError(
            f"the classes of --train-data have changed since the run in {folder.uri} began: {', '.join(begun)} → "
            f"{', '.join(names)}; choose another --out"
        )
    order = range(len(names)) if begun == names else [names.index(name) for name in begun]
    return read_history(folder.uri), tuple(train_table.categories[index] for index in order)


def _check_recipe(config: ResolvedTrainConfig) -> None:
    """Check schedule, augmentation and trackers before any worker starts."""
    from raydet.models.optim.schedules import check_schedule
    from raydet.training.tracking.integrations import check_trackers

    check_schedule(config)
    check_trackers(config.trackers)
    if not isinstance(config.augmentation, str):
        from raydet.augmentation.transforms import check_augmentation

        check_augmentation(config.augmentation)


def _check_model(config: ResolvedTrainConfig, classes: Sequence[Category]) -> None:
    """Check the model without importing torch; the workers check the rest."""
    if config.model in SMALL_MODELS:
        checkpoint = Checkpoint(config.model, SMALL_MODELS[config.model].model_type, ())
    else:
        checkpoint = read_checkpoint(config.model)
    known = [category.name for category in checkpoint.categories]
    check_mapping(config.class_mapping or {}, [category.name for category in classes], known, where=config.model)
    family = family_of(checkpoint.model_type, where=config.model)
    if config.lora:
        require_packages("lora")
        check_adaptable(family, checkpoint.content, where=config.model)
        if config.model in SMALL_MODELS:
            raise UserError(f"--lora adapts pretrained weights, but {config.model} is built from scratch; omit --lora")
    for option, sides in (("image-size", [config.image_size]), ("multi-scale", config.multi_scale)):
        for side in sides:
            if side is not None:
                check_side(option, side, config.model, family)

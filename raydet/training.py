"""`train()`: checks what it is given, starts the workers with Ray Train, and says where the results are.

It imports no torch, so that a mistake is told in a second; the loop of the workers is in `training_loop.py`.
"""

import dataclasses
import json
import os
import time
from dataclasses import dataclass
from typing import Any

import ray
import yaml

from raydet import cluster, storage
from raydet.checkpoints import HISTORY_FILE, STATE_FILE, read_checkpoint
from raydet.config import TrainConfig, changed_fields, to_yaml
from raydet.console import Console
from raydet.errors import UserError
from raydet.families import family_of
from raydet.small_models import SMALL_MODELS
from raydet.tables import Table, open_table


@dataclass(frozen=True)
class TrainResult:
    """Where a run's results are.

    Attributes:
        out: The run folder.
        checkpoint: The best model, a Hugging Face model folder.
        history: One entry an epoch: losses, rates, speed and, where it was validated, the COCO numbers.
        already_done: Nothing was left to do.
    """

    out: str
    checkpoint: str
    history: list[dict[str, Any]]
    already_done: bool = False

    @property
    def best(self) -> dict[str, Any]:
        """The epoch that the checkpoint is of."""
        scored = [entry for entry in self.history if entry.get("AP") is not None]
        return max(scored, key=lambda entry: entry["AP"]) if scored else self.history[-1]

    def lines(self) -> list[str]:
        """What came of the run, for the terminal."""
        best = self.best
        numbers = ", ".join(f"{name} {best[name]:.3f}" for name in ("AP", "AP50", "AP75") if best.get(name) is not None)
        first = ["nothing to do: this run is finished; more epochs would go on with it"] if self.already_done else []
        return [
            *first,
            f"best: {numbers}, in epoch {best['epoch']} of {len(self.history)}",
            f"checkpoint: {self.checkpoint}",
        ]


def train(config: TrainConfig, *, console: Console | None = None) -> TrainResult:
    """Trains a detector; run again after a kill, it goes on where it was.

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
    history = _check_run_folder(config)
    if len(history) >= config.epochs and storage.exists(storage.join(out, "checkpoint", "config.json")):
        return TrainResult(out, storage.join(out, "checkpoint"), history[: config.epochs], already_done=True)
    if not history:
        _check_model(config)

    with cluster.session(storage.join(out, "log")):
        resources = cluster.share_out(
            num_workers=config.num_workers, use_gpu=config.use_gpu, cpus_per_worker=config.cpus_per_worker
        )
        storage.write_bytes(storage.join(out, "config.yaml"), to_yaml(config).encode())
        console.line(
            f"{resources.describe(config.num_workers)}; Ray's log: {storage.join(out, 'log', cluster.LOG_FILE)}"
        )
        board = cluster.Board.remote()  # type: ignore[attr-defined]
        trainer = _trainer(config, tables, resources, board)
        with console.following_training(lambda start: ray.get(board.read.remote(start)), epochs=config.epochs):
            trainer.fit()
        mistake = ray.get(board.mistake.remote())
        if mistake:
            if not history:
                storage.delete_file(storage.join(out, "config.yaml"))
            raise UserError(mistake)
    return TrainResult(out, storage.join(out, "checkpoint"), _read_history(out))


def _trainer(config: TrainConfig, tables: dict[str, Table], resources: cluster.Resources, board: Any) -> Any:
    import ray.train
    from ray.train.torch import TorchTrainer

    return TorchTrainer(
        _run_worker,
        train_loop_config={
            "config": dataclasses.asdict(config),
            "tables": tables,
            "resources": resources,
            "board": board,
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.num_workers,
            use_gpu=resources.use_gpu,
            resources_per_worker={"CPU": resources.cpus_per_worker, **({"GPU": 1} if resources.use_gpu else {})},
        ),
        # The checkpoints are raydet's own, in OUT/last and OUT/checkpoint; Ray keeps only its notes here.
        run_config=ray.train.RunConfig(
            storage_path=storage.join(config.out, "log", "ray"),
            name=f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}",
            failure_config=ray.train.FailureConfig(  # type: ignore[call-arg]
                max_failures=config.max_failures, controller_failure_limit=3
            ),
        ),
    )


def _run_worker(job: dict[str, Any]) -> None:
    from raydet.training_loop import run_worker

    try:
        run_worker(job)
    except UserError as error:
        # Every worker builds the same model and finds the same mistake: no use in starting them again.
        ray.get(job["board"].report_mistake.remote(str(error)))


def _check_tables(config: TrainConfig) -> dict[str, Table]:
    tables = {"train": open_table(config.train_data, "images"), "validate": open_table(config.val_data, "images")}
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
    return tables


def _check_run_folder(config: TrainConfig) -> list[dict[str, Any]]:
    """The history of the run in the folder, empty if there is none; refuses another run's folder."""
    path = storage.join(config.out, "config.yaml")
    if not storage.exists(path):
        if storage.list_files(config.out):
            raise UserError(f"--out {config.out} holds files that are no raydet run; choose another folder")
        return []
    storage.recover_folder(storage.join(config.out, "last"))
    storage.recover_folder(storage.join(config.out, "checkpoint"))
    changes = changed_fields(config, yaml.safe_load(storage.read_bytes(path)))
    # A run that ended before its first checkpoint has left nothing that other settings could spoil.
    if changes and storage.exists(storage.join(config.out, "last", STATE_FILE)):
        raise UserError(
            f"--out {config.out} already holds another run ({'; '.join(changes)}); choose another folder, or the "
            "same settings to go on with it"
        )
    return _read_history(config.out)


def _read_history(out: str) -> list[dict[str, Any]]:
    path = storage.join(out, HISTORY_FILE)
    if not storage.exists(path):
        return []
    history: list[dict[str, Any]] = json.loads(storage.read_bytes(path))
    return history


def _check_model(config: TrainConfig) -> None:
    """What can be told of a model without loading torch; the workers find the rest."""
    if config.model in SMALL_MODELS:
        model_type = config.model.rsplit("_", 1)[0]
    else:
        model_type = read_checkpoint(config.model).model_type
    multiple = family_of(model_type, where=config.model).side_multiple
    if config.image_size is not None and config.image_size % multiple:
        raise UserError(f"image_size must be a multiple of {multiple} for {config.model}, got {config.image_size}")

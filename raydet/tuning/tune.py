"""`tune()`: a search for the training options of the best detector, by many short training runs with Ray Tune.

It does not import torch, so that user errors are reported in seconds. Modules: `space` (varied options), `search`
(proposals, importance), `records` (files of the trials), `plan` (the complete search), `resources` (concurrency),
`trial_run` (one trial in its process), `execution` (all trials), `following` (progress), `results` (table, page, best
model).
"""

import dataclasses
from typing import Any

from raydet.cluster import session, shares
from raydet.common.console import Console, counted
from raydet.common.errors import RunError, UserError
from raydet.common.ray_address import announce
from raydet.config import TrainConfig, TuneConfig, identity, to_yaml
from raydet.config.fields import with_options
from raydet.config.options import build
from raydet.models.recipes.resolve import default_space, resolve
from raydet.tables import storage
from raydet.tables.output_folder import open_folder
from raydet.training.feeding.mixture import images_per_epoch
from raydet.training.feeding.sources import open_sources, with_absolute_sources
from raydet.training.train import check
from raydet.tuning import records
from raydet.tuning.execution import run_trials
from raydet.tuning.following import Follower
from raydet.tuning.plan import Search, TuningPlan
from raydet.tuning.resources import Share, share_out
from raydet.tuning.results import BEST_FOLDER, TuneResult, write_results
from raydet.tuning.search import check_search
from raydet.tuning.space import (
    Dimension,
    check_name,
    naming_value,
    parse_space,
    typed,
    value_in,
    with_parameters,
    with_value,
)

__all__ = ["TuneResult", "tune"]

_FOLDERS = (records.TRIALS_FOLDER, BEST_FOLDER)
_FIXED_BETWEEN_TRIALS = ("epochs", "early_stopping_patience")
"""Train options that may change when a run resumes, but not between the trials of a search."""


@with_options(TuneConfig)
def tune(config: TuneConfig, *, console: Console | None = None) -> TuneResult:
    """Search for the best training options; an interrupted search resumes.

    Raises:
        UserError: The space, the training config, a table or the output folder is invalid. Nothing has been written.
        RunError: All trials failed, or none was measured in time; the table of trials holds the reasons.
    """
    console = console or Console()
    plan = make_plan(config)
    check_search(config.search)
    with open_folder(plan.out, command="tune", notify=console.line) as folder:
        folder.refuse_foreign(_FOLDERS)
        _check_trainings(plan)
        if folder.admit(_identity(plan), folders=_FOLDERS) is None:
            folder.begin(_identity(plan), folders=_FOLDERS)
        folder.write_bytes(to_yaml(plan.config).encode(), "config.yaml")
        search = Search(plan, records.load(plan.out))
        num_to_do = search.num_to_do
        is_over = _run(search, console) if num_to_do else True
        result = write_results(search, is_over=is_over, already_done=num_to_do == 0)
    if result is None:
        raise RunError(_why_nothing(list(search.trials.values())))
    return result


def _run(search: Search, console: Console) -> bool:
    plan, config = search.plan, search.plan.config
    announce(console.line)
    with session.session(storage.join(plan.out, "log")):
        share = share_out(plan.base, config.max_concurrent, search.num_to_do)
        console.line(_announcement(search, share))
        with console.progress("tuning", total=search.num_to_do, unit="trials", leaves_line=False) as progress:
            return run_trials(search, share, Follower(plan, console, progress))


def _announcement(search: Search, share: Share) -> str:
    workers = search.plan.base.max_workers
    gpu = " and 1 GPU" if share.use_gpu else ""
    cpus = f"{share.cpus_per_worker:g} CPU{'s' if share.cpus_per_worker > 1 else ''}{gpu}"
    each = f"{workers} worker{'s' if workers > 1 else ''} per trial, {cpus} per worker"
    trials = f"{counted(search.num_to_do, 'trial')}, {share.max_concurrent} at a time"
    num_over = sum(trial.state != "unfinished" for trial in search.trials.values())
    before = f"resuming after {num_over} of {search.num_to_do + num_over} trials; " if search.trials else ""
    return f"{before}{trials}; {each}. Logs: {search.plan.out}/log"


def make_plan(config: TuneConfig) -> TuningPlan:
    """Build the plan of a search. Reads the number of images and the model, unless all options are given.

    Raises:
        UserError: The space, the training config, the training table or the model is invalid.
    """
    out = storage.absolute_uri(config.out)
    base = _base(config, out)
    num_images = 0 if base.recipe == "none" else images_per_epoch(open_sources(base))
    resolved = resolve(base, num_images=num_images, gpus=shares.gpus_in_reach).config
    space = default_space(resolved) if config.space is None else config.space
    dimensions = tuple(typed(base, dimension) for dimension in parse_space(space))
    points = tuple(
        _typed_point(base, point, dimensions, number) for number, point in enumerate(config.points_to_evaluate)
    )
    epochs = next((dimension.values for dimension in dimensions if dimension.name == "epochs"), ())
    return TuningPlan(
        config=dataclasses.replace(config, space=space),
        base=dataclasses.replace(base, epochs=resolved.epochs),
        resolved=resolved,
        dimensions=dimensions,
        points=points,
        metric=base.metric_for_best_model,
        out=out,
        max_epochs=max([resolved.epochs, *epochs, *(point.get("epochs", 1) for point in points)]),
    )


def _base(config: TuneConfig, out: str) -> TrainConfig:
    """Return the training config that the search varies."""
    values: dict[str, Any] = {} if isinstance(config.train_config, str) else dict(config.train_config)
    file = config.train_config if isinstance(config.train_config, str) else values.pop("config", None)
    given = {"train_data": config.train_data, "val_data": config.val_data, "metric_for_best_model": config.metric}
    values |= {name: value for name, value in given.items() if value is not None}
    values["out"] = storage.join(out, records.TRIALS_FOLDER)
    base = build(TrainConfig, values, program="raydet tune", where="--train-config", file=file)
    return dataclasses.replace(
        with_absolute_sources(base),
        model=storage.absolute_uri(base.model) if storage.exists(base.model) else base.model,
        num_workers=1 if base.num_workers == "auto" else base.num_workers,  # GPUs serve trials rather than workers
    )


def _typed_point(
    base: TrainConfig, point: dict[str, Any], dimensions: tuple[Dimension, ...], number: int
) -> dict[str, Any]:
    """Convert a point's values to the types of the train options."""
    where = f"--points-to-evaluate: point {number + 1}"
    names = [dimension.name for dimension in dimensions]
    for name in point:
        if name not in names:
            check_name(name)
            raise UserError(f"{where} sets {name}, which is not in the space; must be one of {', '.join(names)}")
    try:
        config = with_parameters(base, point)
    except UserError as error:
        raise UserError(f"{where} is invalid: {error}") from None
    return {name: value_in(config, name) for name in point}


def _check_trainings(plan: TuningPlan) -> None:
    """Check tables, models and recipes without training, for the base and for representative values of the space."""
    tables = check(plan.base)
    for dimension in plan.dimensions:
        for value in dimension.probes():
            config = with_value(plan.base, dimension, value)
            with naming_value(dimension, value):
                check(config, tables)


def _identity(plan: TuningPlan) -> dict[str, Any]:
    """Return all settings that affect the result, by names that the user knows."""
    config = identity(plan.config)
    for name in ("train_config", "train_data", "val_data", "metric"):
        del config[name]  # they are part of the training config
    base = identity(plan.resolved) | {name: getattr(plan.resolved, name) for name in _FIXED_BETWEEN_TRIALS}
    return config | {f"train.{name}": value for name, value in base.items()}


def _why_nothing(trials: list[records.Trial]) -> str:
    failed = [trial for trial in trials if trial.state == "failed"]
    if failed and len(failed) == len(trials):
        what = "the only trial failed" if len(failed) == 1 else f"all {len(failed)} trials failed"
        return f"{what}; {failed[0].name}: {failed[0].error}"
    return "no trial was measured within the time limit; run the same command with a higher --time-limit-s to resume"

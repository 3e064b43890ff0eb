"""`loop()`: rounds of score → label → train → measure, in which a model is replaced only by one that is no worse.

Each step is the function of a command, in a folder of its own, where it resumes by itself and recognises what it has
finished. OUT/loop.json holds the finished rounds, so a killed loop repeats no more than a part of a step.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from raydet.cli.rounds import LoopResult, Round, is_stuck, name_of, read_rounds, write_rounds
from raydet.common.class_names import indices_in, is_unused
from raydet.common.console import CommandResult, Console
from raydet.common.errors import UserError
from raydet.config import (
    CompareConfig,
    EvaluateConfig,
    LoopConfig,
    PredictConfig,
    PrepareDetectionsConfig,
    TrainConfig,
    default_of,
    field_names,
    fields_of,
    identity,
    to_yaml,
)
from raydet.config.fields import require, with_options
from raydet.config.options import build
from raydet.engines.engine import check_engine
from raydet.engines.selection import check_classes
from raydet.measuring.compare import compare
from raydet.measuring.evaluate import evaluate
from raydet.measuring.slices import PROPERTIES
from raydet.models.checkpoints import read_checkpoint
from raydet.models.families import family_of
from raydet.preparation.prepare import prepare_detections
from raydet.preparation.sources.scored.rows import open_images
from raydet.preparation.sources.scored.thresholds import check_thresholds
from raydet.scoring.predict import predict
from raydet.tables import storage
from raydet.tables.output_folder import open_folder
from raydet.tables.table import open_table
from raydet.training.feeding.sources import weighted, with_absolute_sources, with_weight
from raydet.training.train import check, train

_Config = TypeVar("_Config")

_FIRST = "first"
"""Folder of the first model, and its run in OUT/metrics."""
_FIXED_BETWEEN_ROUNDS = ("epochs", "early_stopping_patience", "recipe")
"""Options of `train` that may change when a run resumes, but not between the rounds of a loop."""
_EVALUATE_OPTIONS = ("slice_by", "target_precision", "bootstrap", "seed", "num_shards", "ray_address")
_NOT_IN_A_LOOP = {
    "predict": ("checkpoint", "model", "labels", "data", "out", "limit", "operating_point"),
    "labels": ("detections", "data", "out", "val_fraction"),
    "train": ("train_data", "val_data", "out", "model", "class_mapping", "override"),
    "evaluate": tuple(name for name in field_names(EvaluateConfig) if name not in _EVALUATE_OPTIONS),
}
"""Options of the steps that the loop sets, or that cannot hold for every round."""


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """The loop's config with absolute URIs, and those of its steps, which each round gives its model and folders."""

    config: LoopConfig
    predict: PredictConfig
    labels: PrepareDetectionsConfig
    train: TrainConfig
    evaluate: EvaluateConfig


@dataclass(frozen=True)
class _Candidate:
    """A model and its detections on the images of `truth`."""

    checkpoint: str
    detections: str


@with_options(LoopConfig)
def loop(config: LoopConfig, *, console: Console | None = None) -> LoopResult:
    """Improve a detector with its own detections, round by round; an interrupted loop resumes.

    A round scores the unlabelled images with the current model, takes the confident detections as labels, trains the
    current model on these and the labelled images, and compares both models on the images of `truth`. The new model
    becomes the current one if the paired interval of the difference in AP excludes a loss. Otherwise the loop ends,
    because another round would repeat this one.

    Raises:
        UserError: An option of the loop or of a step, a table, the model or the output folder is invalid.
        RunError: A step failed, or was stopped; the same call resumes it.
    """
    console = console or Console()
    plan = _make_plan(config)
    out, num_rounds = plan.config.out, plan.config.rounds
    with open_folder(out, command="loop", notify=console.line) as folder:
        rounds = read_rounds(folder)
        # Before the first round begins, there is nothing that other settings could contradict.
        is_disposable = not rounds and not folder.exists(name_of(1))
        earlier = folder.admit(_identity(plan), is_disposable=is_disposable)
        already_done = is_stuck(rounds) or len(rounds) >= num_rounds
        if not already_done:
            _check(plan, console)
        if earlier is None:
            folder.begin(_identity(plan))
            folder.write_bytes(to_yaml(plan.config).encode(), "config.yaml")
        if not rounds:
            _measure(plan, _FIRST, plan.config.checkpoint, console)
        while not is_stuck(rounds) and len(rounds) < num_rounds:
            last = _run_round(plan, len(rounds) + 1, _current(plan, rounds), console)
            rounds.append(last)
            folder.check()
            write_rounds(folder, _current(plan, rounds).checkpoint, rounds)
            console.record("round", dataclasses.asdict(last), [last.line()])
    checkpoint = _current(plan, rounds).checkpoint
    return LoopResult(out=out, checkpoint=checkpoint, rounds=tuple(rounds), already_done=already_done)


def _run_round(plan: _Plan, number: int, current: _Candidate, console: Console) -> Round:
    config, name = plan.config, name_of(number)
    detections, labels, trained, comparison = (
        storage.join(config.out, name, part) for part in ("detections", "labels", "train", "comparison")
    )
    console.title(f"\n{name}: score the unlabelled images with {current.checkpoint}")
    _show(console, predict(replace(plan.predict, checkpoint=current.checkpoint, out=detections), console=console))
    console.title(f"\n{name}: take confident detections as labels")
    report = prepare_detections(replace(plan.labels, detections=detections, out=labels), console=console)
    _show(console, report)
    num_labels = report.boxes - report.crowd_boxes
    if not num_labels:
        return Round(number=number, num_labels=0)
    console.title(f"\n{name}: train on them and the labelled images")
    train_data = [*_tables_of(plan), with_weight(labels, config.label_weight)]
    training = replace(plan.train, train_data=train_data, model=current.checkpoint, out=trained)
    result = train(training, console=console)
    _show(console, result)
    found = _measure(plan, name, result.checkpoint, console)
    console.title(f"\n{name}: compare with {current.checkpoint}")
    compared = compare(
        CompareConfig(
            truth=config.truth,
            first=current.detections,
            second=found,
            out=comparison,
            bootstrap=plan.evaluate.bootstrap,
            seed=plan.evaluate.seed,
        ),
        console=console,
    )
    _show(console, compared)
    before, after, difference = compared.of("AP", None)
    return Round(
        number=number,
        num_labels=num_labels,
        checkpoint=result.checkpoint,
        ap_before=before.value,
        ap_after=after.value,
        difference=difference.value,
        low=difference.low,
        high=difference.high,
        is_promoted=difference.low is not None and difference.low > -config.max_loss,
    )


def _measure(plan: _Plan, name: str, checkpoint: str, console: Console) -> str:
    """Score the images of `truth` with a model, write its metrics, and return the URI of the detections."""
    config, out = plan.config, _held_out(plan, name)
    console.title(f"\n{name}: measure {checkpoint}")
    _show(console, predict(replace(plan.predict, checkpoint=checkpoint, data=config.truth, out=out), console=console))
    _show(console, evaluate(replace(plan.evaluate, detections=out, run=name), console=console))
    return out


def _current(plan: _Plan, rounds: Sequence[Round]) -> _Candidate:
    """Return the model of the last promoted round, or the first one. URIs in loop.json lack passwords and keys."""
    promoted = [item.name for item in rounds if item.is_promoted]
    if not promoted:
        return _Candidate(plan.config.checkpoint, _held_out(plan, _FIRST))
    trained = storage.join(plan.config.out, promoted[-1], "train", "checkpoint")
    return _Candidate(trained, _held_out(plan, promoted[-1]))


def _held_out(plan: _Plan, name: str) -> str:
    return storage.join(plan.config.out, name, "held_out")


def _show(console: Console, result: CommandResult) -> None:
    for line in result.lines():
        console.line(line)


def _make_plan(config: LoopConfig) -> _Plan:
    """Build the configs of all steps.

    Raises:
        UserError: An option of a step is unknown or invalid, or not one for a loop.
    """
    out, checkpoint = storage.absolute_uri(config.out), config.checkpoint
    if storage.exists(checkpoint):
        checkpoint = storage.absolute_uri(checkpoint)
    unlabelled, truth = storage.absolute_uri(config.unlabelled), storage.absolute_uri(config.truth)
    # Each step gets its own folder, and the current model.
    prediction = _built(PredictConfig, "predict", config.predict, checkpoint=checkpoint, data=unlabelled, out=out)
    labelling = _built(PrepareDetectionsConfig, "labels", config.labels, detections=out, data=unlabelled, out=out)
    data = {"train_data": config.train_data, "val_data": config.val_data}
    training = with_absolute_sources(_built(TrainConfig, "train", config.train, model=checkpoint, out=out, **data))
    metrics = storage.join(out, "metrics")
    evaluation = _built(EvaluateConfig, "evaluate", config.evaluate, truth=truth, detections=out, out=metrics)
    require(evaluation.bootstrap > 0, "--evaluate: bootstrap must be above 0, because the interval decides")
    absolute = replace(
        config,
        out=out,
        checkpoint=checkpoint,
        unlabelled=unlabelled,
        truth=truth,
        train_data=training.train_data,
        val_data=training.val_data,
    )
    return _Plan(config=absolute, predict=prediction, labels=labelling, train=training, evaluate=evaluation)


def _built(config_class: type[_Config], step: str, given: dict[str, Any] | None, **own: Any) -> _Config:
    """Build the config of a step from the options that the user gives, perhaps in a file, and those of the loop."""
    values, refused = dict(given or {}), _NOT_IN_A_LOOP[step]
    file = values.pop("config", None)
    require(file is None or isinstance(file, str), f"--{step}: `config` must name a file, got {file}")
    found = [name for name in refused if name in values]
    if not found:
        try:
            built = build(config_class, {**values, **own}, program="raydet loop", where="the mapping", file=file)
        except UserError as error:
            raise UserError(f"--{step}: {error}") from None
        others = [item for item in fields_of(config_class) if item.name in refused and item.name not in own]
        found = [item.name for item in others if getattr(built, item.name) != default_of(item)]
    if found:
        raise UserError(f"--{step}: a loop sets {found[0]} itself, or cannot have it; omit it")
    return built


def _identity(plan: _Plan) -> dict[str, Any]:
    """Return all settings that affect the result, by names that the user knows."""
    settings = {name: value for name, value in identity(plan.config).items() if name not in _NOT_IN_A_LOOP}
    for step, refused in _NOT_IN_A_LOOP.items():
        values = identity(getattr(plan, step))
        if step == "train":
            values |= {name: getattr(plan.train, name) for name in _FIXED_BETWEEN_ROUNDS}
        settings |= {f"{step}.{name}": value for name, value in values.items() if name not in refused}
    return settings


def _tables_of(plan: _Plan) -> list[str]:
    tables = plan.train.train_data
    return [tables] if isinstance(tables, str) else tables


def _check(plan: _Plan, console: Console) -> None:
    """Check the model, the tables and the options of all steps, as far as that needs no detections.

    Raises:
        UserError: One of them is invalid.
    """
    config = plan.config
    model = read_checkpoint(config.checkpoint)
    family_of(model.model_type, where=config.checkpoint)
    check_engine(plan.predict, model.model_type)
    check_classes(plan.predict.classes, model.categories)
    others = {"--unlabelled": [config.unlabelled], "--train-data": [uri for uri, _ in weighted(_tables_of(plan))]}
    for option, uris in others.items():
        require(config.truth not in uris, f"--truth is also {option}: the AP of models trained on it decides nothing")
    if config.truth == config.val_data:
        console.line("--truth is also --val-data, whose best epoch is chosen: this favours new models slightly")
    truth = open_table(config.truth, "images")
    require(truth.num_rows > 0 and bool(truth.categories), f"--truth {truth.uri} has no images, or none with labels")
    names = [category.name for category in truth.categories]
    places = indices_in(names, [category.name for category in model.categories]).tolist()
    missing = [name for number, name in enumerate(names) if places[number] < 0 and not is_unused(name, number)]
    require(not missing, f"--truth {truth.uri} has classes that --checkpoint does not know: {', '.join(missing)}")
    for name in plan.evaluate.slice_by:
        known = name in PROPERTIES or name in truth.schema.names
        require(known, f"--evaluate: slice_by names {name}, which is no column of {truth.uri}")
    check(plan.train)
    require(open_images(plan.labels).table.num_rows > 0, f"--unlabelled {config.unlabelled} has no images")
    try:
        check_thresholds(plan.labels, [category.name for category in model.categories])
    except UserError as error:
        raise UserError(f"--labels: {error}") from None

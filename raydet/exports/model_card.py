"""The model card of a pushed checkpoint: classes, metrics, data and recipe, as shown on the Hub.

Data is named by the last part of its path only, because home folders and buckets are private.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import pyarrow.compute as pc
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from raydet.common.class_names import match_names
from raydet.common.console import shown
from raydet.common.errors import UserError
from raydet.common.untrusted.documents import DocumentError
from raydet.config import PushConfig, TrainConfig, fields_of
from raydet.exports.markdown import escaped, fenced, markdown_table
from raydet.measuring import metrics_folder
from raydet.measuring.numbers.metrics import METRICS
from raydet.measuring.numbers.values import values_in
from raydet.models.checkpoints import Checkpoint
from raydet.tables import storage
from raydet.tables.table import Table, is_table, read_manifest
from raydet.training.history import EpochRecord, best_epoch, read_history

_CLASS_COLUMNS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100")

_Numbers = Mapping[str, float | None]


@dataclass(frozen=True)
class BuiltCard:
    """A model card.

    Attributes:
        content: Content of README.md: metadata in YAML, then markdown.
        notes: Warnings for the user who pushes it.
    """

    content: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _TrainedRun:
    """Config and history of the training run, next to the checkpoint; empty if missing."""

    config: dict[str, Any]
    history: list[EpochRecord]


@dataclass(frozen=True)
class _CardNumbers:
    """COCO metrics in [0, 1], None if undefined, and their origin."""

    data: str
    num_images: int | None
    origin: str
    overall: _Numbers
    by_class: Mapping[str, _Numbers]
    is_evaluation: bool
    note: str | None = None


def build_card(config: PushConfig, checkpoint: Checkpoint) -> BuiltCard:
    """Build the card of a checkpoint from the files of its training run and of `raydet evaluate`.

    The metrics are those in `config.metrics` or, without it, those of the validation after the checkpoint's epoch.

    Raises:
        UserError: `config.metrics` is not a folder of `raydet evaluate`, or was measured on other classes.
    """
    run = _read_run(checkpoint)
    if config.metrics is None:
        measured = _measured_in_training(checkpoint, run)
    else:
        measured = _measured_by_evaluate(config.metrics, checkpoint)
    notes = (measured.note,) if measured is not None and measured.note else ()
    return BuiltCard(str(_card(config, checkpoint, run, measured)), notes)


def _read_run(checkpoint: Checkpoint) -> _TrainedRun:
    folder = checkpoint.name.rstrip("/").rpartition("/")[0]
    try:
        config = storage.read_yaml(storage.join(folder, "config.yaml"))
    except (OSError, DocumentError):
        config = None
    if not isinstance(config, dict) or not all(isinstance(config.get(key), str) for key in ("model", "train_data")):
        return _TrainedRun({}, [])
    try:
        history = read_history(folder)
    except (OSError, ValueError):
        history = []
    return _TrainedRun(config, history)


def _measured_by_evaluate(metrics: str, checkpoint: Checkpoint) -> _CardNumbers:
    """Read the metrics that `raydet evaluate` wrote."""
    uri = storage.absolute_uri(metrics)
    if not is_table(storage.join(uri, "metrics")):
        raise UserError(
            f"--metrics {metrics} holds no metrics of `raydet evaluate`; it must be the --out folder of that command"
        )
    table = _latest_run(uri, checkpoint.name)
    own, names = ([item.name for item in of.categories] for of in (checkpoint, table))
    if own and own != names and None in match_names(names, own):
        raise UserError(
            f"--metrics {metrics} was measured on the classes {', '.join(names)}, but the checkpoint has "
            f"{', '.join(own)}; run `raydet evaluate` for this checkpoint"
        )
    rows = table.read()
    if not rows.num_rows:
        raise UserError(f"--metrics {metrics} holds no metrics; run `raydet evaluate` again")
    numbers: dict[str | None, dict[str, float | None]] = {name: {} for name in (None, *names)}
    for value in values_in(rows):
        if value.slice is None:
            numbers.setdefault(value.category, {})[value.metric] = value.value
    if not numbers[None]:
        raise UserError(f"--metrics {metrics} holds no metrics over all images; run `raydet evaluate` again")
    data = _bare_name(rows["split"][0].as_py() or "")
    counts = table.manifest["runs"][table.files[0]]
    num_images = counts.get("num_images")
    unreadable = counts.get("num_unreadable") or 0
    origin = f"Measured with `raydet evaluate` on {escaped(data)}" + (f", {num_images:,} images" if num_images else "")
    if unreadable:
        origin += f"; {unreadable:,} of them were unreadable, and their objects count as missed"
    model = rows["model"][0].as_py()
    note = None
    if model is not None and model != checkpoint.name:
        note = f"the metrics in {metrics} were measured with {model}; check that this is the model you push"
    return _CardNumbers(
        data, num_images, origin + ".", numbers[None], {name: numbers[name] for name in names}, True, note
    )


def _latest_run(uri: str, model: str) -> Table:
    """Return the metrics of this model's latest run, or of the latest run if none is of this model."""
    tables = [table for run in metrics_folder.runs_in(uri) if (table := metrics_folder.open_run(uri, "metrics", run))]
    of_model = [table for table in tables if pc.any(pc.equal(table.read(["model"])["model"], model)).as_py()]
    return (of_model or tables)[-1]


def _measured_in_training(checkpoint: Checkpoint, run: _TrainedRun) -> _CardNumbers | None:
    """Return the validation metrics of the checkpoint's epoch."""
    chosen_by = run.config.get("metric_for_best_model") or "AP"
    is_newest = checkpoint.name.rstrip("/").endswith("/last")
    epoch = run.history[-1] if is_newest and run.history else best_epoch(run.history, chosen_by)
    if epoch is None or epoch.validation is None or epoch.value("AP") is None:
        return None
    table = run.config.get("val_data") or ""
    data, num_images = _bare_name(table), _num_images(table, checkpoint)
    part = run.config.get("validate_fraction") or 1.0
    images = "the validation images" if part == 1 else f"{part:.0%} of the validation images"
    why = "the latest epoch" if is_newest else f"the best by {escaped(chosen_by)}"
    when = f"after epoch {epoch.epoch} of {len(run.history)}, {why}"
    origin = f"Measured during training on {images} ({escaped(data)}) {when}."
    if not is_newest:
        origin += " The checkpoint was selected by these metrics, so expect somewhat lower ones on other images."
    return _CardNumbers(
        data,
        num_images if part == 1 else None,
        origin,
        {metric.name: epoch.value(metric.name) for metric in METRICS},
        {item.name: {"AP": epoch.value(f"AP:{item.name}")} for item in checkpoint.categories},
        is_evaluation=False,
    )


def _num_images(uri: str, checkpoint: Checkpoint) -> int | None:
    """Return the number of images in a table; None if it is missing or in a different store from the checkpoint.

    A different store is not tried: if it is unreachable from here, a request takes about 15 s to time out.
    """
    if urlsplit(uri).scheme not in ("", "file", urlsplit(checkpoint.name).scheme):
        return None
    try:
        return int(read_manifest(uri)["num_rows"])
    except (OSError, ValueError, KeyError):
        return None


def _card(config: PushConfig, checkpoint: Checkpoint, run: _TrainedRun, measured: _CardNumbers | None) -> ModelCard:
    model = run.config.get("model", "")
    base = model if re.fullmatch(r"[\w.-]+/[\w.-]+", model) else None
    title = config.repo.partition("/")[2]
    results = _eval_results(measured)
    data = ModelCardData(
        base_model=base,
        library_name="transformers",
        license=config.license,
        pipeline_tag="object-detection",
        tags=["object-detection", "raydet", checkpoint.model_type],
        model_name=title if results else None,
        eval_results=results,
    )
    origin = ""
    if base:
        origin = f", fine-tuned from [{escaped(base)}](https://huggingface.co/{base})"
    elif model:
        # A path names a folder on one machine and says nothing about the model.
        origin = ", fine-tuned from another checkpoint" if "/" in model else f", trained from scratch as `{model}`"
    sections = [
        f"# {escaped(title)}",
        f"A `{checkpoint.model_type}` object detector{origin}. Trained with raydet.",
        *_classes_section(checkpoint),
        *_numbers_section(measured),
        *_use_section(config),
        *_data_section(checkpoint, run, measured),
        *_recipe_section(run),
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")


def _eval_results(measured: _CardNumbers | None) -> list[EvalResult] | None:
    if measured is None:
        return None
    slug = re.sub(r"[^a-z0-9_-]+", "-", measured.data.lower()).strip("-") or "images"
    return [
        EvalResult(
            task_type="object-detection",
            task_name="Object Detection",
            dataset_type=slug,
            dataset_name=measured.data,
            metric_type=metric.name,
            metric_name=metric.name,
            metric_value=measured.overall[metric.name],
        )
        for metric in METRICS
        if measured.overall.get(metric.name) is not None
    ] or None


def _classes_section(checkpoint: Checkpoint) -> list[str]:
    names = [(str(index), escaped(item.name)) for index, item in enumerate(checkpoint.categories)]
    return ["## Classes", markdown_table(("index", "class"), names)] if names else []


def _numbers_section(measured: _CardNumbers | None) -> list[str]:
    if measured is None:
        return ["## Evaluation", "Not measured."]
    rows = [
        (
            metric.name,
            shown(measured.overall.get(metric.name)),
            ".50:.95" if metric.iou is None else f"{metric.iou:.2f}".lstrip("0"),
            metric.area,
            str(metric.max_detections),
        )
        for metric in METRICS
    ]
    columns = [name for name in _CLASS_COLUMNS if any(name in numbers for numbers in measured.by_class.values())]
    by_class = [
        (escaped(name), *(shown(numbers.get(column)) for column in columns))
        for name, numbers in measured.by_class.items()
    ]
    sections = [
        "## Evaluation",
        f"{measured.origin} These are COCO metrics, equal to those of pycocotools.",
        markdown_table(("metric", "value", "IoU", "area", "detections"), rows),
    ]
    return [*sections, markdown_table(("class", *columns), by_class)] if by_class else sections


def _use_section(config: PushConfig) -> list[str]:
    revision = f', revision="{config.revision}"' if config.revision else ""
    code = f"""\
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForObjectDetection, pipeline

detector = pipeline("object-detection", model="{config.repo}"{revision})
print(detector("image.jpg", threshold=0.3))

# Or step by step:
processor = AutoImageProcessor.from_pretrained("{config.repo}"{revision})
model = AutoModelForObjectDetection.from_pretrained("{config.repo}"{revision})
image = Image.open("image.jpg").convert("RGB")
outputs = model(**processor(images=image, return_tensors="pt"))
found = processor.post_process_object_detection(
    outputs, threshold=0.3, target_sizes=[(image.height, image.width)]
)"""
    shell, name = "", config.repo
    if config.revision:
        shell, name = f"hf download {config.repo} --revision {config.revision} --local-dir model\n", "./model"
    shell += "raydet prepare images --images FOLDER --out TABLE\n"
    shell += f"raydet predict --checkpoint {name} --data TABLE --out DETECTIONS"
    return ["## Use", fenced(code, "python"), "On many images, with raydet:", fenced(shell, "bash")]


def _data_section(checkpoint: Checkpoint, run: _TrainedRun, measured: _CardNumbers | None) -> list[str]:
    uses = [
        (use, run.config[key])
        for use, key in (("training", "train_data"), ("validation", "val_data"))
        if key in run.config
    ]
    rows = [(use, escaped(_bare_name(uri)), shown(_num_images(uri, checkpoint), ",")) for use, uri in uses]
    if measured is not None and measured.is_evaluation:
        rows.append(("evaluation", escaped(measured.data), shown(measured.num_images, ",")))
    return ["## Data", markdown_table(("used for", "images table", "images"), rows)] if rows else []


def _recipe_section(run: _TrainedRun) -> list[str]:
    """List the training options that affect the result, and `epochs`, which is operational but informative."""
    names = [
        item.name
        for item in fields_of(TrainConfig)
        if (not item.metadata["operational"] or item.name == "epochs")
        and item.name not in ("train_data", "val_data", "model")
        and item.name in run.config
    ]
    if not names:
        return []
    recipe = yaml.safe_dump(
        {name: _without_paths(run.config[name]) for name in names}, sort_keys=False, allow_unicode=True
    )
    trained = f"Trained for {len(run.history)} epochs" if run.history else "Trained"
    return ["## Recipe", f"{trained} with these options of `raydet train`:", fenced(recipe.rstrip("\n"), "yaml")]


def _bare_name(uri: str) -> str:
    """Return the last part of a path or URI, without host, credentials, query and parent folders."""
    path = urlsplit(uri).path if "://" in uri else uri
    return path.rstrip("/").rpartition("/")[2].rpartition("@")[2] or "images"


def _without_paths(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    return _bare_name(value) if isinstance(value, str) and "/" in value else value

"""The model card of a pushed checkpoint: classes, metrics, data and recipe, as shown on the Hub.

Data is named by the last part of its path only, because home folders and buckets are private.
"""

import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from raydet.common.class_names import match_names
from raydet.common.console import shown
from raydet.common.errors import UserError
from raydet.config import PushConfig, TrainConfig, fields_of
from raydet.exports.markdown import escaped, fenced, markdown_table
from raydet.measuring import metrics_folder
from raydet.measuring.numbers.metrics import METRICS
from raydet.models.checkpoints import Checkpoint
from raydet.reporting.run_tables import read_run
from raydet.tables import storage
from raydet.tables.table import is_table, read_manifest
from raydet.training.feeding.sources import weighted
from raydet.training.history import EpochRecord, History, best_epoch, read_history

_CLASS_COLUMNS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100")
_Numbers = Mapping[str, float | None]


@dataclass(frozen=True)
class _TrainedRun:
    """Config and history of the training run, next to the checkpoint; empty if missing."""

    config: dict[str, Any]
    history: list[EpochRecord]


@dataclass(frozen=True, kw_only=True)
class _CardNumbers:
    """COCO metrics in [0, 1], None if undefined, and their origin."""

    data: str
    num_images: int | None
    origin: str
    overall: _Numbers
    by_class: Mapping[str, _Numbers]
    is_evaluation: bool = False
    note: str | None = None


def build_card(config: PushConfig, checkpoint: Checkpoint) -> tuple[str, tuple[str, ...]]:
    """Build the card of a checkpoint from the files of its training run and of `raydet evaluate`.

    The metrics are those in `config.metrics` or, without it, those of the validation after the checkpoint's epoch.

    Returns:
        Content of README.md, metadata in YAML and markdown, and warnings for the user who pushes it.

    Raises:
        UserError: `config.metrics` is not a folder of `raydet evaluate`, or was measured on other classes.
    """
    run = _read_run(checkpoint)
    measured = (
        _measured_by_evaluate(config.metrics, checkpoint) if config.metrics else _measured_in_training(checkpoint, run)
    )
    notes = (measured.note,) if measured is not None and measured.note else ()
    return str(_card(config, checkpoint, run, measured)), notes


def _read_run(checkpoint: Checkpoint) -> _TrainedRun:
    folder = checkpoint.name.rstrip("/").rpartition("/")[0]
    with contextlib.suppress(OSError, ValueError):
        config, history = storage.read_yaml(storage.join(folder, "config.yaml")), History()
        is_run = isinstance(config, dict) and isinstance(config.get("model"), str)
        if is_run and isinstance(config.get("train_data"), str | list):
            with contextlib.suppress(OSError, ValueError):
                history = read_history(folder)
            return _TrainedRun(config, history)
    return _TrainedRun({}, [])


def _measured_by_evaluate(metrics: str, checkpoint: Checkpoint) -> _CardNumbers:
    """Read the metrics that `raydet evaluate` wrote."""
    uri = storage.absolute_uri(metrics)
    if not is_table(storage.join(uri, "metrics")):
        raise UserError(
            f"--metrics {metrics} holds no metrics of `raydet evaluate`; it must be the --out folder of that command"
        )
    run = read_run(uri, _latest_run(uri, checkpoint.name))
    own, names = [item.name for item in checkpoint.categories], run.classes
    if own and tuple(own) != names and None in match_names(names, own):
        raise UserError(
            f"--metrics {metrics} was measured on the classes {', '.join(names)}, but the checkpoint has "
            f"{', '.join(own)}; run `raydet evaluate` for this checkpoint"
        )
    numbers: dict[str | None, dict[str, float | None]] = {name: {} for name in (None, *names)}
    for (slice_name, metric, category), value in run.values.items():
        if slice_name is None:
            numbers.setdefault(category, {})[metric] = value.value
    if not numbers[None]:
        raise UserError(f"--metrics {metrics} holds no metrics over all images; run `raydet evaluate` again")
    data, num_images = _bare_name(run.split or ""), run.entry.get("num_images")
    origin = f"Measured with `raydet evaluate` on {escaped(data)}" + (f", {num_images:,} images" if num_images else "")
    if run.entry.get("num_unreadable"):
        origin += f"; {run.entry['num_unreadable']:,} of them were unreadable, and their objects count as missed"
    note = f"the metrics in {metrics} were measured with {run.model}; check that this is the model you push"
    return _CardNumbers(
        data=data,
        num_images=num_images,
        origin=f"{origin}.",
        overall=numbers[None],
        by_class={name: numbers[name] for name in names},
        is_evaluation=True,
        note=note if run.model not in (None, checkpoint.name) else None,
    )


def _latest_run(uri: str, model: str) -> str:
    """Return this model's latest run, or the latest run if none is of this model."""
    runs = metrics_folder.runs_in(uri)
    tables = {run: metrics_folder.open_run(uri, "metrics", run) for run in runs}
    of_model = [
        run
        for run, table in tables.items()
        if table is not None and model in table.read(["model"])["model"].to_pylist()
    ]
    return [*runs, *of_model][-1]


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
        data=data,
        num_images=num_images if part == 1 else None,
        origin=origin,
        overall={metric.name: epoch.value(metric.name) for metric in METRICS},
        by_class={item.name: {"AP": epoch.value(f"AP:{item.name}")} for item in checkpoint.categories},
    )


def _num_images(uri: str, checkpoint: Checkpoint) -> int | None:
    """Return the number of images in a table; None if it is missing or in a different store from the checkpoint."""
    # If another store is unreachable from here, a request takes about 15 s to time out.
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
    common: Any = {"task_type": "object-detection", "task_name": "Object Detection"}
    common |= {"dataset_type": slug, "dataset_name": measured.data}
    return [
        EvalResult(**common, metric_type=metric.name, metric_name=metric.name, metric_value=value)
        for metric in METRICS
        if (value := measured.overall.get(metric.name)) is not None
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
    of_classes = measured.by_class.items()
    by_class = [(escaped(name), *(shown(numbers.get(column)) for column in columns)) for name, numbers in of_classes]
    origin = f"{measured.origin} These are COCO metrics, equal to those of pycocotools."
    sections = ["## Evaluation", origin, markdown_table(("metric", "value", "IoU", "area", "detections"), rows)]
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
        ("training" if weight == 1 else f"training, weight {weight:g}", uri)
        for uri, weight in weighted(run.config.get("train_data", []))
    ]
    uses += [("validation", run.config["val_data"])] if "val_data" in run.config else []
    rows = [(use, escaped(_bare_name(uri)), shown(_num_images(uri, checkpoint), ",")) for use, uri in uses]
    if measured is not None and measured.is_evaluation:
        rows.append(("evaluation", escaped(measured.data), shown(measured.num_images, ",")))
    return ["## Data", markdown_table(("used for", "images table", "images"), rows)] if rows else []


def _recipe_section(run: _TrainedRun) -> list[str]:
    """List the training options that affect the result, and `epochs`, which is operational but informative."""
    options = {
        item.name: _without_paths(run.config[item.name])
        for item in fields_of(TrainConfig)
        if (not item.metadata["operational"] or item.name == "epochs")
        and item.name not in ("train_data", "val_data", "model")
        and item.name in run.config
    }
    if not options:
        return []
    recipe = yaml.safe_dump(options, sort_keys=False, allow_unicode=True)
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
        return list(map(_without_paths, value))
    return _bare_name(value) if isinstance(value, str) and "/" in value else value

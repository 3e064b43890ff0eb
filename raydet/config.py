"""One frozen dataclass per job; a YAML file and options on the command line make one, or one clear error.

A field is *operational* when it changes how long a run takes or where it runs, but not what comes out; all others
are its identity: a folder may be continued only by a run of the same identity.
"""

import dataclasses
import difflib
import hashlib
import json
import re
import textwrap
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import yaml

from raydet.errors import UserError

ImageStorage = Literal["inline", "reference"]
Precision = Literal["fp32", "bf16"]
Augmentation = Literal["none", "flip", "light", "strong"]
Schedule = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "cosine_with_min_lr",
]

DEFAULT_MAX_PIXELS = 178_956_970
"""Larger pictures are refused as decompression bombs; the number is Pillow's own limit (a quarter gigabyte of RGB)."""


def _option(help: str, default: Any = dataclasses.MISSING, *, operational: bool = False) -> Any:
    return field(default=default, metadata={"help": help, "operational": operational})


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _require_positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(value is None or value > 0, f"{name} must be above 0, got {value}")


@dataclass(frozen=True, kw_only=True)
class PrepareImagesConfig:
    """A folder or URI of images without labels → an images table."""

    images: str = _option("folder or URI of the images, with its subfolders")
    out: str = _option("folder or URI of the images table to write")
    image_storage: ImageStorage = _option("inline: image bytes in the table; reference: only their paths", "inline")
    max_pixels: int = _option("larger pictures are rejected as decompression bombs", DEFAULT_MAX_PIXELS)
    num_threads: int | None = _option("decoding threads (all cores by default)", None, operational=True)

    def __post_init__(self) -> None:
        _require_positive(self, "max_pixels", "num_threads")


@dataclass(frozen=True, kw_only=True)
class PrepareCocoConfig(PrepareImagesConfig):
    """COCO instances JSON and a folder of images → an images table."""

    annotations: str = _option("COCO instances JSON file, whose file names are relative to the folder of images")


@dataclass(frozen=True, kw_only=True)
class PrepareShapesConfig:
    """Generated pictures of rectangles, ellipses and triangles → two images tables, OUT/train and OUT/val."""

    out: str = _option("folder or URI; the tables are OUT/train and OUT/val")
    num_train: int = _option("training images", 1000)
    num_val: int = _option("held-out images", 200)
    image_size: int = _option("side of the square pictures in pixels", 128)
    max_shapes: int = _option("most shapes in a picture; the fewest is none", 6)
    seed: int = _option("the same seed gives the same pixels", 0)
    num_threads: int | None = _option("decoding threads (all cores by default)", None, operational=True)

    def __post_init__(self) -> None:
        _require_positive(self, "num_train", "num_val", "max_shapes", "num_threads")
        _require(self.image_size >= 32, f"image_size must be at least 32, got {self.image_size}")
        _require(self.seed >= 0, f"seed must not be negative, got {self.seed}")


@dataclass(frozen=True, kw_only=True)
class _WorkersConfig:
    """What jobs with a model on several workers have in common; none of it changes what comes out."""

    num_workers: int = _option("workers side by side, each with its copy of the model", 1, operational=True)
    use_gpu: bool | None = _option("one GPU per worker; by default, when the cluster has any", None, operational=True)
    cpus_per_worker: float | None = _option(
        "CPUs reserved for each worker; by default half of the cluster's, shared out, the rest decodes",
        None,
        operational=True,
    )
    threads_per_worker: int | None = _option(
        "torch threads in a worker; its share of the cores", None, operational=True
    )

    def __post_init__(self) -> None:
        _require_positive(self, "num_workers", "cpus_per_worker", "threads_per_worker")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(_WorkersConfig):
    """Fine-tune a detector, or train a small one from scratch."""

    train_data: str = _option("images table to learn from")
    val_data: str = _option("images table to validate on after each epoch")
    out: str = _option("run folder: OUT/checkpoint is the best model, OUT/last the newest", operational=True)

    model: str = _option(
        "a Hub name, a local model folder, or a named small model built from scratch (rt_detr_v2_small, …)",
        "rt_detr_v2_small",
    )
    image_size: int | None = _option(
        "side in pixels that images are resized to (for models that keep the aspect: of the longest side); "
        "the model's own by default",
        None,
    )
    freeze_batch_norm: bool = _option("keep batch-norm statistics and weights as loaded", False)

    epochs: int = _option("passes over the training images; may be raised later", 50, operational=True)
    batch_size: int = _option("images per optimizer step, over all workers together", 8)
    accumulate: int = _option("parts that each worker splits its share of a batch into, to save memory", 1)
    learning_rate: float = _option("AdamW's peak rate", 1e-4)
    backbone_learning_rate: float | None = _option("the backbone's own; a tenth of learning_rate by default", None)
    weight_decay: float = _option("not applied to biases and norms", 1e-4)
    schedule: Schedule = _option("learning-rate schedule, by transformers.get_scheduler's name", "cosine")
    schedule_epochs: int | None = _option("epochs the schedule is laid out for; `epochs` by default", None)
    warmup_steps: int = _option("steps of linear warm-up", 0)
    max_grad_norm: float = _option("gradients are clipped to this norm", 0.1)
    precision: Precision = _option("fp32, or bf16 autocast", "fp32")
    augmentation: Augmentation = _option("none, flip, light (the Hugging Face guide's) or strong", "light")
    plain_epochs: int = _option("last epochs without augmentation other than flips", 0)
    ema_decay: float = _option("moving average of the weights, validated and saved as the model; 0 is off", 0.0)
    seed: int = _option("of the weights, the order of the images and their augmentation", 0)

    validate_every: int = _option("epochs between two validations; the last epoch always has one", 1)
    validate_batch_size: int | None = _option("images at once in validation; batch_size by default", None)

    max_failures: int = _option("times that dead workers are replaced before giving up", 3, operational=True)
    shuffle_window_mb: int = _option("compressed images shuffled together", 256)

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_positive(self, "epochs", "batch_size", "accumulate", "learning_rate", "backbone_learning_rate")
        _require_positive(self, "validate_every", "validate_batch_size", "shuffle_window_mb", "max_grad_norm")
        _require_positive(self, "schedule_epochs")
        for name in ("weight_decay", "warmup_steps", "plain_epochs", "max_failures", "seed"):
            _require(getattr(self, name) >= 0, f"{name} must not be negative, got {getattr(self, name)}")
        _require(0 <= self.ema_decay < 1, f"ema_decay must be at least 0 and below 1, got {self.ema_decay}")
        _require(
            self.image_size is None or self.image_size >= 32, f"image_size must be at least 32, got {self.image_size}"
        )
        _require(
            self.batch_size >= self.num_workers,
            f"batch_size is over all workers together: {self.batch_size} images cannot keep {self.num_workers} workers "
            "busy; raise batch_size or lower num_workers",
        )


@dataclass(frozen=True, kw_only=True)
class PredictConfig(_WorkersConfig):
    """Run a checkpoint over an images table → a detections table, one row for each image."""

    checkpoint: str = _option("model folder, as written by train, or a Hub name")
    data: str = _option("images table")
    out: str = _option("folder or URI of the detections table", operational=True)
    batch_size: int = _option("images that the model sees at once", 16)
    score_threshold: float = _option("detections at or below this score are left out; 0 keeps all, as AP needs", 0.0)
    precision: Precision = _option("fp32, or bf16 autocast", "fp32")
    max_pixels: int = _option("larger pictures are reported as decompression bombs", DEFAULT_MAX_PIXELS)

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_positive(self, "batch_size", "max_pixels")
        _require(0 <= self.score_threshold < 1, f"score_threshold must be in [0, 1), got {self.score_threshold}")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Truth and detections → metrics tables, and the COCO numbers on the screen."""

    truth: str = _option("images table, or COCO instances JSON")
    detections: str = _option("detections table, or COCO results JSON")
    out: str | None = _option(
        "folder of the metrics tables; without it the numbers are only printed", None, operational=True
    )
    run: str | None = _option("name of this run in the tables; by default that of the detections' folder", None)
    model: str | None = _option("name of the model in the tables", None)
    split: str | None = _option("name of the split in the tables; by default that of the truth", None)
    num_shards: int | None = _option(
        "parts matched side by side; the numbers do not depend on it", None, operational=True
    )

    def __post_init__(self) -> None:
        _require_positive(self, "num_shards")


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """The whole way on generated images: prepare, train, predict, evaluate."""

    out: str = _option("run folder", "runs/demo", operational=True)
    recipe: str | None = _option("training config; jobs/configs/demo.yaml by default", None)
    num_train: int = _option("training images", 800)
    num_val: int = _option("held-out images", 100)
    epochs: int | None = _option("passes over the training images; the recipe's by default", None)
    num_workers: int = _option("training workers", 1, operational=True)

    def __post_init__(self) -> None:
        _require_positive(self, "num_train", "num_val", "epochs", "num_workers")


Config = TypeVar("Config")


def field_names(config_class: type) -> list[str]:
    """The options of a config, in the order they are declared."""
    return [item.name for item in _fields(config_class)]


def _fields(config_class: type) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(config_class)


def identity(config: Any) -> dict[str, Any]:
    """The fields that decide what comes out, without the operational ones."""
    return {
        item.name: getattr(config, item.name) for item in dataclasses.fields(config) if not item.metadata["operational"]
    }


def config_hash(config: Any) -> str:
    """Twelve hexadecimal digits that stand for a config's identity."""
    content = json.dumps([type(config).__name__, identity(config)], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:12]


def to_yaml(config: Any) -> str:
    """The whole resolved config, every field with its value."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def changed_fields(config: Any, earlier: dict[str, Any]) -> list[str]:
    """Which identity fields differ from an earlier config of the same class, as `name: then → now`."""
    now = identity(config)
    return [f"{name}: {earlier.get(name)} → {now[name]}" for name in now if earlier.get(name) != now[name]]


def load(config_class: type[Config], arguments: Sequence[str], *, program: str = "raydet") -> Config:
    """Makes a config of command-line options.

    `--config FILE` may stand among them; options override the file wherever they stand. Options may be written with
    `-` or `_`; one that is true or false may be given without a value, or with `no-` before it.

    Raises:
        UserError: An unknown option, a wrong value, a missing one, a file that cannot be read.
        SystemExit: After `--help` or `--print-config`, with code 0.
    """
    tokens, config_files, print_config = _normalise(config_class, arguments)
    if tokens and tokens[0] in ("-h", "--help"):
        print(_help(config_class, program))
        raise SystemExit(0)
    values: dict[str, Any] = {}
    for path in config_files:
        values.update(_read_yaml(config_class, path))
    config = _parse(config_class, values, tokens, program)
    if print_config:
        print(to_yaml(config), end="")
        raise SystemExit(0)
    return config


def _parse(config_class: type[Config], values: dict[str, Any], tokens: Sequence[str], program: str) -> Config:
    import jsonargparse

    parser = jsonargparse.ArgumentParser(prog=program, exit_on_error=False)
    hints = typing.get_type_hints(config_class)
    required = []
    for item in _fields(config_class):
        if item.default is dataclasses.MISSING:
            required.append(item.name)
            parser.add_argument(f"--{item.name}", type=hints[item.name])
        else:
            parser.add_argument(f"--{item.name}", type=hints[item.name], default=item.default)
    try:
        parsed = parser.parse_object(values, defaults=True)
        parsed = parser.parse_args(list(tokens), namespace=parsed)
    except (jsonargparse.ArgumentError, TypeError, ValueError) as error:
        raise UserError(_wrong_value(str(error))) from None
    missing = [f"--{name.replace('_', '-')}" for name in required if parsed[name] is None]
    if missing:
        raise UserError(f"missing {', '.join(missing)}; see {program} --help")
    return config_class(**{name: parsed[name] for name in field_names(config_class)})


def _wrong_value(message: str) -> str:
    """jsonargparse's message in one line, without the spelling of Python's types."""
    line = _one_line(message)
    match = re.match(
        r'(?:Parser key|Problem with) "?(\w+)"?: (?:Expected a|.*?Expected a) (.*?)\. Got value: (.*)', line
    )
    if not match:
        return line
    name, expected, value = match.groups()
    expected = re.sub(r"<class '(\w+)'>", r"\1", expected)
    choices = re.match(r"typing\.Literal\[(.*)\]", expected)
    if choices:
        return f"{name} must be one of {choices.group(1).replace(chr(39), '')}; got {value}"
    return f"{name} must be of type {expected}; got {value}"


def _help(config_class: type, program: str) -> str:
    """The options of a command, one each, with what they are by default."""
    hints = typing.get_type_hints(config_class)
    lines = [f"usage: {program} [--config FILE.yaml] [options]", "", config_class.__doc__ or "", ""]
    for item in _fields(config_class):
        option = f"--{item.name.replace('_', '-')}"
        hint = hints[item.name]
        choices = f" ({' | '.join(typing.get_args(hint))})" if typing.get_origin(hint) is Literal else ""
        if item.default is dataclasses.MISSING:
            default = "required"
        else:
            default = "" if item.default is None else f"default: {yaml.safe_dump(item.default).splitlines()[0]}"
        lines.append(f"  {option}{choices}")
        text = f"{item.metadata['help']} [{default}]" if default else item.metadata["help"]
        lines += textwrap.wrap(text, width=100, initial_indent=" " * 8, subsequent_indent=" " * 8)
    lines += [
        "",
        "  --config FILE",
        "        YAML file with any of these options; options on the command line override it",
    ]
    lines += ["  --print-config", "        print the whole resulting config as YAML and stop"]
    return "\n".join(lines)


def load_file(config_class: type[Config], path: str, **overrides: Any) -> Config:
    """Makes a config of a YAML file, with some fields set by the caller."""
    given = {name: value for name, value in overrides.items() if value is not None}
    return _parse(config_class, {**_read_yaml(config_class, path), **given}, [], "raydet")


def _normalise(config_class: type, arguments: Sequence[str]) -> tuple[list[str], list[str], bool]:
    """Writes options with `_`, gives lone switches their value, and takes out `--config` and `--print-config`."""
    hints = typing.get_type_hints(config_class)
    switches = {name for name, hint in hints.items() if hint is bool or _is_optional_bool(hint)}
    result: list[str] = []
    files: list[str] = []
    print_config = False
    rest = list(arguments)
    while rest:
        token = rest.pop(0)
        if token == "-h":
            return ["--help"], [], False
        if not token.startswith("--"):
            raise UserError(f"unexpected `{token}`; options are written --name value")
        key, equals, value = token[2:].partition("=")
        name = key.replace("-", "_")
        if name == "print_config":
            print_config = True
        elif name == "config":
            if not equals and not rest:
                raise UserError("--config needs a file")
            files.append(value if equals else rest.pop(0))
        elif name.removeprefix("no_") in switches and name not in switches and not equals:
            result.append(f"--{name.removeprefix('no_')}=false")
        elif name in switches and not equals and (not rest or rest[0].startswith("--")):
            result.append(f"--{name}=true")
        elif name == "help":
            return ["--help"], [], False
        elif name not in hints:
            raise UserError(f"unknown option --{key}{_suggestion(name, config_class, '--')}")
        elif not equals and name in hints:
            if not rest:
                raise UserError(f"--{key} needs a value")
            result.append(f"--{name}={rest.pop(0)}")
        else:
            result.append(f"--{name}{equals}{value}")
    return result, files, print_config


def _is_optional_bool(hint: Any) -> bool:
    return isinstance(hint, types.UnionType) and bool in typing.get_args(hint)


def _read_yaml(config_class: type, path: str) -> dict[str, Any]:
    from raydet import storage

    try:
        content = yaml.safe_load(storage.read_bytes(path))
    except FileNotFoundError:
        raise UserError(f"no such config file: {path}") from None
    except (yaml.YAMLError, OSError) as error:
        raise UserError(f"cannot read the config file {path}: {_one_line(str(error))}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold `option: value` lines, found a {type(content).__name__}")
    for name in content:
        if name not in field_names(config_class):
            raise UserError(f"unknown key `{name}` in {path}{_suggestion(str(name), config_class)}")
    return content


def _suggestion(name: str, config_class: type, prefix: str = "") -> str:
    close = difflib.get_close_matches(name, field_names(config_class), n=1)
    if not close:
        return "; see --help for those there are"
    suggested = close[0].replace("_", "-") if prefix else close[0]
    return f"; did you mean {prefix}{suggested}?"


def _one_line(message: str) -> str:
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return " ".join(lines)

"""A training config → the same config with every option decided, and where each value comes from."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from raydet.config import (
    ResolvedTrainConfig,
    TrainConfig,
    field_names,
    to_yaml,
)
from raydet.models.optim.schedules import NO_WARMUP
from raydet.models.recipes.facts import SMALL_SIDE, RecipeFacts, read_facts
from raydet.models.recipes.table import RECIPES, Recipe, from_scratch

GIVEN = "given"
"""Source of a value that the user gave."""
LOW_AP = 0.2
"""AP below which a model from scratch has learnt too little to be of use."""

_FEW_IMAGES, _FEW_IMAGES_FROM_SCRATCH = 2000, 400
"""Images up to which a batch has 8 instead of 16 images, so that an epoch has more steps."""
_LONG_RUN_PRESETS, _SHORT_RUN_STEPS = ("rtdetr", "dfine"), 500
"""Presets with zoom-out and crops, and the steps up to which a run learns more from `light`."""
_PRETRAINED_ADVICE = (
    "start from a pretrained model instead, such as --model PekingU/rtdetr_v2_r18vd, or from one trained on similar "
    "images"
)

Begun = Mapping[str, tuple[Any, str]]
"""Values that the recipe decided when a run began, each with its source."""


@dataclass(frozen=True)
class Resolved:
    """A training config in which every option has a value.

    Attributes:
        config: The config.
        sources: Where each value that a recipe may decide comes from, by option; empty for `--recipe none`.
        lines: Lines for the terminal.
        advice: Line for a model from scratch that has learnt too little; empty for a pretrained one.
    """

    config: ResolvedTrainConfig
    sources: Mapping[str, str]
    lines: tuple[str, ...] = ()
    advice: str = ""

    def to_yaml(self) -> str:
        """Format the config as YAML, with the source of each value as a comment."""
        return to_yaml(self.config, comments=self.sources)


def resolve(config: TrainConfig, *, num_images: int, gpus: Callable[[], int], begun: Begun | None = None) -> Resolved:
    """Decide the options that the user has not given.

    The result depends on the model, the number of images and the device; the number of workers decides the size of
    micro-batches only.

    Args:
        config: The config as given.
        num_images: Rows of the training table.
        gpus: Returns the number of GPUs that the run may use; called only if something depends on it.
        begun: Values of the run to resume. They replace the recipe's, so that more epochs or images, or another
            version of raydet, do not change a run that has begun.

    Raises:
        UserError: There is no such model, or raydet cannot train it.
    """
    given = {name: getattr(config, name) for name in field_names(TrainConfig) if getattr(config, name) is not None}
    if given["num_workers"] == "auto":
        del given["num_workers"]
    if config.lora:  # says so itself
        given["freeze_backbone"] = "all"
    if config.recipe == "none":
        return Resolved(ResolvedTrainConfig(**given), {})
    facts = read_facts(config.model, config.image_size)
    decisions = _Decisions(given, begun or {})
    _decide(decisions, config, facts, recipe_of(facts), max(num_images, 1), gpus)
    resolved = ResolvedTrainConfig(**{**given, **decisions.values})
    advice = "" if facts.is_pretrained else f"because {config.model} was trained from scratch; {_PRETRAINED_ADVICE}"
    lines = [_line(resolved, decisions, facts, num_images)]
    if not facts.is_pretrained:
        lines.append(
            f"{config.model} has no pretrained weights, and {num_images:,} images cannot replace them: use it for "
            f"experiments; for real data {_PRETRAINED_ADVICE}"
        )
    return Resolved(resolved, decisions.sources, tuple(lines), advice)


def recipe_of(facts: RecipeFacts) -> Recipe:
    """Look up the recipe of a model."""
    rows = RECIPES[facts.family.model_type]
    recipe = rows.get(facts.variant) or next(iter(rows.values()))
    return recipe if facts.is_pretrained else from_scratch(recipe)


def begun_values(identity: Mapping[str, Any], sources: Mapping[str, str]) -> Begun:
    """Return the values that the recipe decided, from the record of a run: its settings, and the source of each."""
    return {name: (identity[name], source) for name, source in sources.items() if source != GIVEN and name in identity}


def default_space(resolved: ResolvedTrainConfig) -> dict[str, Any]:
    """Return a space of training options around those of a recipe, for a search."""
    presets = [resolved.augmentation, *(name for name in ("flip", "light", "strong") if name != resolved.augmentation)]
    centres = {
        "learning_rate": (resolved.learning_rate, 3),
        "backbone_learning_rate": (resolved.backbone_rate, 3),
        "weight_decay": (resolved.weight_decay or 1e-4, 10),
    }
    around = {name: {"loguniform": [value / factor, value * factor]} for name, (value, factor) in centres.items()}
    return {**around, "augmentation": {"choice": presets}}


class _Decisions:
    """Values decided so far, and their sources."""

    def __init__(self, given: Mapping[str, Any], begun: Begun) -> None:
        self._given, self._begun = given, begun
        self.values: dict[str, Any] = {}
        self.sources: dict[str, str] = {}

    def is_open(self, name: str) -> bool:
        """Return True if the recipe decides an option."""
        return name not in self._given and name not in self._begun

    def __call__(self, name: str, value: Any, source: str) -> Any:
        """Decide an option, unless the user or the begun run already has, and return its value."""
        if name in self._given:
            value, source = self._given[name], GIVEN
        elif name in self._begun:
            value, source = self._begun[name]
        self.values[name], self.sources[name] = value, source
        return value


def _decide(
    decide: _Decisions,
    config: TrainConfig,
    facts: RecipeFacts,
    recipe: Recipe,
    num_images: int,
    gpus: Callable[[], int],
) -> None:
    row = f"{facts.family.model_type} {facts.variant}".strip() if facts.is_pretrained else "from scratch"
    said = f"{row} ({recipe.source})"
    few = _FEW_IMAGES if facts.is_pretrained else _FEW_IMAGES_FROM_SCRATCH
    batch_size = decide("batch_size", 8 if num_images <= few else 16, f"8 up to {few:,} images, 16 above")
    is_on_gpu, num_gpus = config.use_gpu, 0
    if (decide.is_open("precision") and is_on_gpu is None) or (
        decide.is_open("num_workers") and is_on_gpu is not False
    ):
        num_gpus = gpus()
        is_on_gpu = num_gpus > 0 if is_on_gpu is None else is_on_gpu
    decide("num_workers", max(1, min(num_gpus, batch_size)), "all GPUs, at most one for each image of a batch")
    decide("precision", "bf16" if is_on_gpu else "fp32", "bf16 on GPUs, fp32 on CPUs")
    epochs = decide("epochs", _epochs(num_images, is_pretrained=facts.is_pretrained), f"{num_images:,} images")

    scale, source = 1.0, said
    if recipe.scales_with_batch:
        scale = batch_size / recipe.batch_size
        scaled = "" if scale == 1 else f", scaled to {batch_size}"
        source = f"{recipe.learning_rate:g} at a batch of {recipe.batch_size}{scaled}: {said}"
    rate = decide("learning_rate", _short(recipe.learning_rate * scale), source)
    if config.lora:
        decide("backbone_learning_rate", rate, "× 1: adapters start at zero")
        decide("layer_decay", 1.0, "1: adapters start at zero")
    else:
        factor = recipe.backbone_factor
        decide("backbone_learning_rate", _short(rate * factor), f"× {factor:.3g}: {row}")
        decide("layer_decay", recipe.layer_decay, row)
    decide("learning_rate_factors", dict(recipe.factors), row)
    decide("weight_decay", recipe.weight_decay, row)
    decide("max_grad_norm", recipe.max_grad_norm, row)
    decide("freeze_backbone", recipe.freeze_backbone, row)
    decide("batch_norm", "sync", "batch norms that learn see the images of all workers")

    steps_per_epoch = math.ceil(num_images / batch_size)
    num_steps = steps_per_epoch * (config.schedule_epochs or epochs)
    warmup = min(recipe.warmup_steps, recipe.warmup_epochs * steps_per_epoch, num_steps // 10)
    limits = f"at most {recipe.warmup_steps:,} steps, {recipe.warmup_epochs} epoch{'s' * (recipe.warmup_epochs > 1)}"
    if config.schedule in NO_WARMUP:
        decide("warmup_steps", 0, f"{config.schedule} has none")
    else:
        decide("warmup_steps", warmup, f"{limits}, a tenth of the run: {row}")
    memory = min(max(num_steps / 8, 100.0), 10_000.0)
    decide("ema_decay", round(1 - 1 / memory, 5), f"an eighth of {num_steps:,} steps, at least 100, at most 10,000")
    decide("ema_rise_steps", min(max(num_steps // 5, 100), 2000), "a fifth of the run, at least 100, at most 2,000")

    if recipe.augmentation in _LONG_RUN_PRESETS and num_steps <= _SHORT_RUN_STEPS:
        decide("augmentation", "light", f"{recipe.augmentation} needs more than {_SHORT_RUN_STEPS} steps: {row}")
    else:
        decide("augmentation", recipe.augmentation, row)
    plain = min(max(1, round(recipe.plain_part * epochs)), epochs // 2) if recipe.plain_part else 0
    decide("close_mosaic", plain, f"{recipe.plain_part:.1%} of the epochs: {row}")
    if decide.is_open("multi_scale") and config.compile:
        decide("multi_scale", [], "one size, because --compile compiles each")
    else:
        sides = _sides(facts, recipe) if decide.is_open("multi_scale") else []
        decide("multi_scale", sides, row)
    decide("gradient_accumulation_steps", _parts(facts, recipe, decide.values, batch_size), "micro-batches for 16 GB")
    decide("validate_every", max(1, epochs // 20), "at least 20 validations")
    decide("early_stopping_patience", 15, "validations, in a run of at least 20")


def _epochs(num_images: int, *, is_pretrained: bool) -> int:
    """Return the passes over the images, so that the number of steps grows with the root of that of the images."""
    if is_pretrained:
        return min(max(round(50 * math.sqrt(1000 / num_images)), 12), 100)
    return min(max(round(75 * math.sqrt(200 / num_images)), 36), 150)


def _short(rate: float) -> float:
    return float(f"{rate:.3g}")


def _sides(facts: RecipeFacts, recipe: Recipe) -> list[int]:
    """Return the sides of the input in training, multiples of what the model divides; empty for a single size."""
    side = facts.side
    if side is None or (recipe.scales == (1.0, 1.0) and not recipe.scale_steps):
        return []
    multiple = facts.multiple
    if recipe.scale_steps:
        steps = range(-recipe.scale_steps, recipe.scale_steps + 1)
        sides = [side + step * multiple for step in steps if side + step * multiple >= 2 * multiple]
    else:
        step = math.lcm(multiple, 32)
        low, high = (factor * side / step for factor in recipe.scales)
        sides = [step * number for number in range(max(1, math.ceil(low - 0.01)), math.floor(high + 0.01) + 1)]
    sides = [each for each in sides if each >= 32 and each % multiple == 0]
    if sides and sides[0] < SMALL_SIDE:
        least = facts.least_side()
        sides = [each for each in sides if each >= least]
    return sides if len(sides) > 1 else []


def _parts(facts: RecipeFacts, recipe: Recipe, values: Mapping[str, Any], batch_size: int) -> int:
    """Return the micro-batches of each worker, so that their images fit into the memory of a small GPU."""
    workers = values["num_workers"]
    fewest: int = workers[0] if isinstance(workers, list) else workers
    per_worker = math.ceil(batch_size / fewest)
    side = facts.side or facts.reference_side
    at_once = max(1, int(recipe.images_at_once * (facts.reference_side / side) ** 2))
    return math.ceil(per_worker / at_once)


def _line(config: ResolvedTrainConfig, decisions: _Decisions, facts: RecipeFacts, num_images: int) -> str:
    start = f"{facts.family.model_type} {facts.variant}".strip() if facts.is_pretrained else "from scratch"
    augmentation = config.augmentation if isinstance(config.augmentation, str) else "a list of transforms"
    rate = decisions.sources["learning_rate"].partition(":")[0]
    note = f" ({rate})" if "scaled" in rate else ""
    return (
        f"recipe {start}, {num_images:,} images: {config.epochs} epochs in batches of {config.batch_size}, learning "
        f"rate {config.learning_rate:g}{note}, backbone {config.backbone_rate:g}, warm-up {config.warmup_steps} steps, "
        f"augmentation {augmentation}, {config.precision}; config.yaml has all values and their sources"
    )

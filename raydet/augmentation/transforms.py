"""Augmentation: an image with its boxes, its mixing partners and a seed → an augmented image with its boxes.

The image processor's resize to the model's size comes afterwards. albumentations is imported only where needed
(`light`, `strong` and custom pipelines), since importing it takes seconds in every new worker.
"""

import difflib
import inspect
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, get_args

import numpy as np

from raydet.augmentation.pipeline import Pipeline
from raydet.augmentation.presets import steps_of
from raydet.augmentation.samples import MIN_VISIBLE, Partners, Sample, WorkingSize, clipped
from raydet.common.errors import UserError, one_line
from raydet.config import Augmentation, AugmentationSpec


class Augmenter:
    """A preset or custom pipeline, deterministic given the seed passed with each image.

    Each step by itself drops boxes whose visible share after a crop is too small; `presets.py` has the presets.
    """

    def __init__(self, spec: AugmentationSpec, working_size: WorkingSize | None = None) -> None:
        """Build the pipeline.

        Args:
            spec: Name of a preset, or a list of albumentations transforms.
            working_size: Size at which images are augmented, which limits zoom-out; None keeps their resolution.

        Raises:
            UserError: The preset or a transform is unknown, or an argument is invalid.
        """
        if isinstance(spec, str):
            _require_preset(spec)
            self._steps = steps_of(spec, working_size)
        else:
            self._steps = [_custom_pipeline(spec)]

    def __call__(self, sample: Sample, *, seed: int, partners: Partners | None = None) -> Sample:
        """Augment one image.

        Args:
            sample: The decoded image; it is not modified.
            seed: Seed; the result depends only on seed, sample and partners.
            partners: Images to mix with, used only by `strong`.

        Returns:
            The augmented image with the boxes that remain visible. Its pixels may be a view.
        """
        rng, others = np.random.default_rng(seed), partners or Partners()
        others = Partners(*(tuple(clipped(other) for other in role) for role in (others.mosaic, others.mixup)))
        sample = clipped(sample)
        for step in self._steps:
            sample = step(sample, rng, others)
        return sample


def check_augmentation(spec: AugmentationSpec) -> None:
    """Build a pipeline and try each of its transforms once; imports albumentations only for a list.

    Args:
        spec: A preset's name, or a list of `{TransformName: {argument: value} | None}`. Groups such as
            `OneOf`, `SomeOf` and `Sequential` have such a list as argument `transforms`.

    Raises:
        UserError: The preset or a transform is unknown, an argument is invalid, or a transform does not work on images
            with boxes; the message names the transform and the problem.
    """
    if isinstance(spec, str):
        _require_preset(spec)
        return
    for transform, path in [leaf for item in spec for leaf in _leaves(item, "augmentation")]:
        _try(transform, path)
    _custom_pipeline(spec)


def plain_of(spec: AugmentationSpec) -> AugmentationSpec:
    """Return the augmentation of the last epochs (`close_mosaic`): `flip` if the pipeline flips, otherwise `none`."""
    if isinstance(spec, str):
        return "none" if spec == "none" else "flip"
    # A pipeline without a flip suggests images, such as text, that must not be mirrored.
    return "flip" if "HorizontalFlip" in _names(spec) else "none"


def _names(spec: list[dict[str, Any]]) -> Iterator[str]:
    for item in spec:
        for name, arguments in item.items():
            yield name
            yield from _names((arguments or {}).get("transforms", []))


def _require_preset(name: str) -> None:
    if name not in get_args(Augmentation):
        raise UserError(f"unknown augmentation `{name}`; choose from {', '.join(get_args(Augmentation))}")


def _custom_pipeline(spec: list[dict[str, Any]]) -> Pipeline:
    return Pipeline([_build(item, "augmentation") for item in spec], min_visible=MIN_VISIBLE)


@lru_cache(maxsize=1)
def _catalogue() -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the usable transforms of albumentations, which keep boxes and image consistent, and its groups."""
    import albumentations as A

    classes = {name: value for name, value in vars(A).items() if inspect.isclass(value) and not name.startswith("_")}
    bases = {A.BasicTransform, A.DualTransform, A.ImageOnlyTransform, A.Transform3D, A.Compose, A.ReplayCompose}
    groups = {name: value for name, value in classes.items() if issubclass(value, A.BaseCompose)}
    transforms = {
        name: value
        for name, value in classes.items()
        if issubclass(value, A.ImageOnlyTransform | A.DualTransform) and not issubclass(value, A.Transform3D)
    }
    groups.pop("BaseCompose", None)
    return (
        {name: value for name, value in transforms.items() if value not in bases},
        {name: value for name, value in groups.items() if value not in bases},
    )


def _parse(item: Any, where: str) -> tuple[str, Any, dict[str, Any], bool]:
    """Check all names in a transform; return its name, class and arguments, and True if it is a group."""
    if not isinstance(item, dict) or len(item) != 1:
        raise UserError(f"{where}: each transform must be written as `Name: {{argument: value}}`, got {item}")
    name, arguments = next(iter(item.items()))
    transforms, groups = _catalogue()
    if name not in transforms | groups:
        close = difflib.get_close_matches(str(name), [*transforms, *groups], n=1)
        hint = f"did you mean {close[0]}?" if close else "names are those of albumentations' classes"
        raise UserError(f"{where}: unknown transform `{name}` for images with boxes; {hint}")
    if not isinstance(arguments, dict | None):
        raise UserError(f"{where}: the arguments of {name} must be written as {{argument: value}}, got {arguments}")
    kind = (transforms | groups)[name]
    known = [parameter for parameter in inspect.signature(kind.__init__).parameters if parameter != "self"]
    for argument in arguments or {}:
        if argument not in known:
            close = difflib.get_close_matches(str(argument), known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"choose from {', '.join(known)}"
            raise UserError(f"{where}: {name} has no argument `{argument}`; {hint}")
    return name, kind, arguments or {}, name in groups


def _build(item: Any, where: str) -> Any:
    """Build an albumentations transform, including nested ones."""
    name, kind, arguments, is_group = _parse(item, where)
    if is_group:
        inner = arguments.get("transforms")
        if not isinstance(inner, list) or not inner:
            raise UserError(
                f"{where}: {name} requires `transforms`, a list of `Name: {{argument: value}}`; got {inner}"
            )
        p = arguments.get("p", 0.5)
        if not isinstance(p, int | float) or not 0 <= p <= 1:
            raise UserError(f"{where}: {name}: p must be between 0 and 1, got {p}")
        arguments = {**arguments, "transforms": [_build(one, f"{where}: {name}") for one in inner]}
    try:
        return kind(**arguments)
    except Exception as error:
        raise UserError(f"{where}: {name}: {_reason(error)}") from None


def _leaves(item: Any, where: str) -> Iterator[tuple[Any, str]]:
    """Yield the transforms of an item except groups, built with p = 1, and the path to each for messages."""
    name, kind, arguments, is_group = _parse(item, where)
    if not is_group:
        _build(item, where)
        takes_p = "p" in inspect.signature(kind.__init__).parameters
        yield _build({name: {**arguments, "p": 1.0} if takes_p else arguments}, where), f"{where}: {name}"
        return
    _build(item, where)
    for one in arguments["transforms"]:
        yield from _leaves(one, f"{where}: {name}")


def _try(transform: Any, where: str) -> None:
    """Run a transform once, so that failures appear before any worker starts."""
    from albumentations.augmentations.crops.transforms import CropSizeError

    missing = set(transform.targets_as_params) - {"image", "bboxes"}
    if missing:
        raise UserError(f"{where} requires {', '.join(sorted(missing))}, which images tables do not contain")
    image = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    box = np.array([[100.0, 100.0, 200.0, 200.0]])
    one = np.array([1])
    sample = Sample(image, box, one, np.array([40000.0]), np.array([False]), one)
    try:
        result = Pipeline([transform], min_visible=MIN_VISIBLE)(sample, np.random.default_rng(0), Partners())
    except Exception as error:
        if isinstance(error, CropSizeError) or "image sizes" in str(error):
            return  # too large for the test image, but perhaps not for the user's images
        raise UserError(f"{where}: {_reason(error)}") from None
    if not isinstance(result.image, np.ndarray) or result.image.dtype != np.uint8 or result.image.shape[2:] != (3,):
        raise UserError(f"{where} must return an 8-bit RGB image; the model's image processor normalises later")


def _reason(error: Exception) -> str:
    """Return albumentations' message on one line; for failed validations, each argument and its problem."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    if not lines or "validation error" not in lines[0]:
        return one_line(error)
    faults: dict[str, str] = {}
    place = ""
    for line in lines[1:]:
        if not line.startswith(" "):
            place = line.split(".")[0] + ": "
        elif "[type=" in line:
            problem, _, details = line.strip().partition(" [type=")
            value = re.search(r"input_value=(.*), input_type=", details)
            # For missing or incompatible arguments, the value is a dictionary of all arguments.
            shown = "" if value is None or value[1].startswith("{") else f", got {value[1]}"
            faults.setdefault(place, problem.removeprefix("Value error, ") + shown)
    return "; ".join(place + problem for place, problem in faults.items())

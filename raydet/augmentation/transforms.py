"""Augmentation: an image with its boxes, its mixing partners and a seed → an augmented image with its boxes.

The image processor's resize to the model's size comes afterwards. albumentations is imported only where needed
(`light`, `strong` and custom pipelines), since importing it takes seconds in every new worker.
"""

import difflib
import inspect
import os
import re
import warnings
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, get_args

import numpy as np

from raydet.augmentation.mixing import (
    FILL,
    MIN_AREA_PX,
    MIN_VISIBLE,
    Partners,
    Sample,
    clipped,
    copy_small,
    detr_crop,
    flip,
    mixup,
    mosaic,
    moved,
)
from raydet.common.boxes import as_boxes
from raydet.common.errors import UserError, one_line
from raydet.config import Augmentation, AugmentationSpec

# Otherwise albumentations checks for a newer version over the network at each import.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

COPY_SMALL_P = 0.3
"""Probability that `strong` copies small objects; `ordering` has the probabilities of mosaic and mixup."""
CROP_P = 0.3
"""Probability that `strong` crops."""

Step = Callable[[Sample, np.random.Generator, Partners], Sample]


class Augmenter:
    """A preset or custom pipeline, deterministic given the seed passed with each image.

    Presets: `none`; `flip` (horizontal); `light` (from the Hugging Face guide: perspective, flip, brightness, contrast,
    hue); `detr` (flip, and DETR's random crop with probability 0.5; its random sizes are `multi_scale`, since the
    model's resize comes last); `strong` (mosaic of four, copies of small objects, mixup, crop, flip, affine, colour,
    blur or noise).

    Each step by itself drops boxes whose visible share after a crop is too small.
    """

    def __init__(self, spec: AugmentationSpec) -> None:
        """Build the pipeline.

        Raises:
            UserError: The preset or a transform is unknown, or an argument is invalid.
        """
        self._steps = _steps(spec)

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


def _steps(spec: AugmentationSpec) -> list[Step]:
    if not isinstance(spec, str):
        return [_custom_pipeline(spec)]
    _require_preset(spec)
    if spec == "light":
        return [_Pipeline(_light(), min_visible=0.0)]
    if spec == "strong":
        return [_mix, _sometimes(CROP_P, detr_crop), _FLIP, _Pipeline(_strong(), min_visible=MIN_VISIBLE)]
    steps: dict[str, list[Step]] = {"none": [], "flip": [_FLIP], "detr": [_FLIP, _sometimes(0.5, detr_crop)]}
    return steps[spec]


def _sometimes(p: float, change: Callable[[Sample, np.random.Generator], Sample]) -> Step:
    return lambda sample, rng, _: change(sample, rng) if rng.random() < p else sample


_FLIP = _sometimes(0.5, lambda sample, _: flip(sample))


def _mix(sample: Sample, rng: np.random.Generator, partners: Partners) -> Sample:
    if partners.mosaic:
        sample = mosaic(sample, partners.mosaic, rng)
    if rng.random() < COPY_SMALL_P:
        sample = copy_small(sample, rng)
    for partner in partners.mixup:
        sample = mixup(sample, partner, rng)
    return sample


class _Pipeline:
    """Step that applies an albumentations pipeline."""

    def __init__(self, transforms: list[Any], *, min_visible: float) -> None:
        import albumentations as A

        boxes = A.BboxParams(
            format="coco", label_fields=["row"], clip=True, min_area=MIN_AREA_PX, min_visibility=min_visible
        )
        with warnings.catch_warnings():
            # albumentations warns about pipelines that change only colours.
            warnings.filterwarnings("ignore", message="Got processor for bboxes")
            self._compose = A.Compose(transforms, bbox_params=boxes)

    def __call__(self, sample: Sample, rng: np.random.Generator, _: Partners) -> Sample:
        self._compose.set_random_seed(int(rng.integers(2**32)))
        rows = np.arange(len(sample.ids), dtype=np.int64)
        result = self._compose(image=np.ascontiguousarray(sample.image), bboxes=sample.boxes_xywh, row=rows)
        # albumentations returns the row of each remaining box; the other arrays are selected by row.
        rows = np.asarray(result["row"], dtype=np.int64).reshape(-1)
        return clipped(moved(sample, result["image"], as_boxes(result["bboxes"]), rows))


def _light() -> list[Any]:
    import albumentations as A

    return [
        A.Perspective(p=0.1),
        A.HorizontalFlip(p=0.5),
        A.RandomBrightnessContrast(p=0.5),
        A.HueSaturationValue(p=0.1),
    ]


def _strong() -> list[Any]:
    import albumentations as A

    return [
        A.Affine(scale=(0.7, 1.2), translate_percent=(-0.1, 0.1), rotate=0, fill=FILL, p=0.5),
        A.RandomBrightnessContrast(brightness_limit=0.2, contrast_limit=0.2, p=0.5),
        A.HueSaturationValue(hue_shift_limit=10, sat_shift_limit=20, val_shift_limit=15, p=0.3),
        A.OneOf([A.GaussianBlur(blur_limit=(3, 5)), A.GaussNoise(std_range=(0.02, 0.06))], p=0.1),
    ]


def _custom_pipeline(spec: list[dict[str, Any]]) -> _Pipeline:
    return _Pipeline([_build(item, "augmentation") for item in spec], min_visible=MIN_VISIBLE)


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
        result = _Pipeline([transform], min_visible=MIN_VISIBLE)(sample, np.random.default_rng(0), Partners())
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

"""Augmentation: one image with its boxes, its partners and one seed → one image with its boxes.

The resize to the model's size, which is the image processor's own, comes after it. albumentations is imported only
for what needs it (`light`, `strong` and pipelines of one's own), since that costs seconds in every new worker.
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

# Or albumentations asks the network for a newer version at each import.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

COPY_SMALL_P = 0.3
"""Share of the images of `strong` that get copies of their small objects; `ordering` has those of its partners."""
CROP_P = 0.3
"""Share of the images of `strong` that are cropped."""

Step = Callable[[Sample, np.random.Generator, Partners], Sample]


class Augmenter:
    """A preset or a pipeline of one's own, deterministic by the seed given with each image.

    The presets: `none`; `flip` (left and right); `light` (the Hugging Face guide's: perspective, flip, brightness,
    contrast, hue); `detr` (flip, and DETR's random crop for every second image; its random sizes are
    `multi_scale`, since the model's own resize comes last); `strong` (mosaic of four, copies of small objects,
    mixup, crop, flip, affine, colour, blur or noise).

    Boxes that a crop hides are dropped by the share of them that is still visible, at each step by itself.
    """

    def __init__(self, spec: AugmentationSpec) -> None:
        """Builds the pipeline.

        Raises:
            UserError: No such preset or transform, or one with wrong arguments.
        """
        self._steps = _steps(spec)

    def __call__(self, sample: Sample, *, seed: int, partners: Partners | None = None) -> Sample:
        """Augments one image.

        Args:
            sample: The image as decoded; it is not changed.
            seed: The same seed, image and partners give the same result.
            partners: What the image is mixed with; only `strong` mixes.

        Returns:
            The new image with the boxes that are still to be seen in it. Its pixels may be a view.
        """
        rng, others = np.random.default_rng(seed), partners or Partners()
        others = Partners(*(tuple(clipped(other) for other in role) for role in (others.mosaic, others.mixup)))
        sample = clipped(sample)
        for step in self._steps:
            sample = step(sample, rng, others)
        return sample


def check_augmentation(spec: AugmentationSpec) -> None:
    """Builds a pipeline and tries each of its transforms once; imports albumentations only for a list.

    Args:
        spec: A preset's name, or a list of `{TransformName: {argument: value} | None}`. The arguments of `OneOf`,
            `SomeOf`, `Sequential` and their like hold such a list themselves, named `transforms`.

    Raises:
        UserError: No such preset or transform, a wrong argument, or a transform that cannot work here; the message
            names the transform and what is wrong.
    """
    if isinstance(spec, str):
        _require_preset(spec)
        return
    for transform, path in [leaf for item in spec for leaf in _leaves(item, "augmentation")]:
        _try(transform, path)
    _own_pipeline(spec)


def plain_of(spec: AugmentationSpec) -> AugmentationSpec:
    """What the last epochs do instead (`close_mosaic`): flips, where the pipeline flips at all."""
    if isinstance(spec, str):
        return "none" if spec == "none" else "flip"
    # What a flip would spoil, such as writing, has a pipeline without one.
    return "flip" if "HorizontalFlip" in _names(spec) else "none"


def _names(spec: list[dict[str, Any]]) -> Iterator[str]:
    for item in spec:
        for name, arguments in item.items():
            yield name
            yield from _names((arguments or {}).get("transforms", []))


def _require_preset(name: str) -> None:
    if name not in get_args(Augmentation):
        raise UserError(f"no augmentation `{name}`; there are {', '.join(get_args(Augmentation))}")


def _steps(spec: AugmentationSpec) -> list[Step]:
    if not isinstance(spec, str):
        return [_own_pipeline(spec)]
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
    """A pipeline of albumentations as a step."""

    def __init__(self, transforms: list[Any], *, min_visible: float) -> None:
        import albumentations as A

        boxes = A.BboxParams(
            format="coco", label_fields=["row"], clip=True, min_area=MIN_AREA_PX, min_visibility=min_visible
        )
        with warnings.catch_warnings():
            # It wonders about pipelines that change colours only.
            warnings.filterwarnings("ignore", message="Got processor for bboxes")
            self._compose = A.Compose(transforms, bbox_params=boxes)

    def __call__(self, sample: Sample, rng: np.random.Generator, _: Partners) -> Sample:
        self._compose.set_random_seed(int(rng.integers(2**32)))
        rows = np.arange(len(sample.ids), dtype=np.int64)
        result = self._compose(image=np.ascontiguousarray(sample.image), bboxes=sample.boxes_xywh, row=rows)
        # Which rows are left comes back beside the boxes, and all else follows by row.
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


def _own_pipeline(spec: list[dict[str, Any]]) -> _Pipeline:
    return _Pipeline([_build(item, "augmentation") for item in spec], min_visible=MIN_VISIBLE)


@lru_cache(maxsize=1)
def _catalogue() -> tuple[dict[str, Any], dict[str, Any]]:
    """The transforms of albumentations that move boxes with their image or leave both in place, and its groups."""
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
    """The name, class and arguments of a transform, and whether it is a group, all of them checked for spelling."""
    if not isinstance(item, dict) or len(item) != 1:
        raise UserError(f"{where}: each transform must be written as `Name: {{argument: value}}`, got {item}")
    name, arguments = next(iter(item.items()))
    transforms, groups = _catalogue()
    if name not in transforms | groups:
        close = difflib.get_close_matches(str(name), [*transforms, *groups], n=1)
        hint = f"did you mean {close[0]}?" if close else "its names are those of albumentations' classes"
        raise UserError(f"{where}: no transform `{name}` for images with boxes; {hint}")
    if not isinstance(arguments, dict | None):
        raise UserError(f"{where}: the arguments of {name} must be written as {{argument: value}}, got {arguments}")
    kind = (transforms | groups)[name]
    known = [parameter for parameter in inspect.signature(kind.__init__).parameters if parameter != "self"]
    for argument in arguments or {}:
        if argument not in known:
            close = difflib.get_close_matches(str(argument), known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"it has {', '.join(known)}"
            raise UserError(f"{where}: {name} has no argument `{argument}`; {hint}")
    return name, kind, arguments or {}, name in groups


def _build(item: Any, where: str) -> Any:
    """One transform of albumentations, with all those inside it."""
    name, kind, arguments, is_group = _parse(item, where)
    if is_group:
        inner = arguments.get("transforms")
        if not isinstance(inner, list) or not inner:
            raise UserError(f"{where}: {name} needs `transforms`, a list of `Name: {{argument: value}}`; got {inner}")
        p = arguments.get("p", 0.5)
        if not isinstance(p, int | float) or not 0 <= p <= 1:
            raise UserError(f"{where}: {name}: p must be from 0 to 1, got {p}")
        arguments = {**arguments, "transforms": [_build(one, f"{where}: {name}") for one in inner]}
    try:
        return kind(**arguments)
    except Exception as error:
        raise UserError(f"{where}: {name}: {_reason(error)}") from None


def _leaves(item: Any, where: str) -> Iterator[tuple[Any, str]]:
    """The transforms of an item that are no groups, each with p of 1 and where it stands."""
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
    """Runs a transform once, so that what it cannot do shows before any worker starts."""
    from albumentations.augmentations.crops.transforms import CropSizeError

    missing = set(transform.targets_as_params) - {"image", "bboxes"}
    if missing:
        raise UserError(f"{where} needs {', '.join(sorted(missing))}, which a table of images with boxes does not have")
    image = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    box = np.array([[100.0, 100.0, 200.0, 200.0]])
    one = np.array([1])
    sample = Sample(image, box, one, np.array([40000.0]), np.array([False]), one)
    try:
        result = _Pipeline([transform], min_visible=MIN_VISIBLE)(sample, np.random.default_rng(0), Partners())
    except Exception as error:
        if isinstance(error, CropSizeError) or "image sizes" in str(error):
            return  # too large for this picture, which says nothing about the user's
        raise UserError(f"{where}: {_reason(error)}") from None
    if not isinstance(result.image, np.ndarray) or result.image.dtype != np.uint8 or result.image.shape[2:] != (3,):
        raise UserError(f"{where} does not leave an RGB picture of 8 bits; the model's own normalisation comes later")


def _reason(error: Exception) -> str:
    """albumentations' message in one line: of a failed validation, what is wrong with which argument."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    if not lines or "validation error" not in lines[0]:
        return one_line(error)
    faults: dict[str, str] = {}
    place = ""
    for line in lines[1:]:
        if not line.startswith(" "):
            place = line.split(".")[0] + ": "
        elif "[type=" in line:
            said, _, details = line.strip().partition(" [type=")
            value = re.search(r"input_value=(.*), input_type=", details)
            # Of a missing argument, as of arguments that do not go together, the value is all of them.
            shown = "" if value is None or value[1].startswith("{") else f", got {value[1]}"
            faults.setdefault(place, said.removeprefix("Value error, ") + shown)
    return "; ".join(place + said for place, said in faults.items())

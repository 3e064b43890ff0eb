"""The view: encoded image → decode → (shrink, augment) → resize → model input.

Training, validation, scoring, inspection and the benchmarks all use this module, so they see the same pixels.
OpenCV and albumentations are imported only for augmentations that need them, torch only to resize.
"""

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from raydet.common.boxes import xywh_to_normalised_cxcywh
from raydet.config import DEFAULT_MAX_PIXELS, AugmentationSpec, ResolvedTrainConfig
from raydet.images.decode import DecodeError, decode, upright_size_hw
from raydet.images.references import image_bytes
from raydet.models.geometry import Image, ResizeRule, SizeHW, resized_planes

if TYPE_CHECKING:
    from raydet.augmentation.samples import Sample, WorkingSize
    from raydet.augmentation.taught import Taught
    from raydet.augmentation.transforms import Augmenter

_SCALE_STREAM = 2
"""Last word of the seed for a step's image size; `ordering` has those of other random choices."""


@dataclass(frozen=True)
class SeenImage:
    """Model input for one image, with its targets.

    Attributes:
        planes: uint8 RGB [3, H, W] at the model's size, without padding.
        original_size_hw: Height and width in pixels of the upright image before augmentation and resize.
        boxes_cxcywh: Boxes normalised to the image, float32 [N, 4]; crowd boxes, and boxes of classes that the image is
            not labelled for, are excluded.
        categories: Category indices, int64 [N].
        labelled: Classes that the image is labelled for, ascending, int64 [K]; None for all.
        taught: What teachers found in the image; None without any.
    """

    planes: Image
    original_size_hw: SizeHW
    boxes_cxcywh: npt.NDArray[np.float32]
    categories: npt.NDArray[np.int64]
    labelled: npt.NDArray[np.int64] | None = None
    taught: "Taught | None" = None

    @property
    def image(self) -> Image:
        """The pixels as uint8 RGB [H, W, 3]."""
        return self.planes.transpose(1, 2, 0)


@dataclass(frozen=True, kw_only=True)
class View:
    """Conversion of table rows to model input, in training and validation.

    Attributes:
        resize_rule: The model's resize.
        max_pixels: Larger images count as unreadable.
        augmentation: Name of a preset, or an albumentations pipeline.
        seed: Seed of the augmentation and of the choice among `step_resize_rules`.
        plain_from_epoch: First epoch, counted from 0, with at most flips and a fixed size; None disables it.
        step_resize_rules: Resizes from which each training step before that epoch draws; empty means `resize_rule`.
    """

    resize_rule: ResizeRule
    max_pixels: int = DEFAULT_MAX_PIXELS
    augmentation: AugmentationSpec = "none"
    seed: int = 0
    plain_from_epoch: int | None = None
    step_resize_rules: tuple[ResizeRule, ...] = ()

    @classmethod
    def of_training(
        cls, config: ResolvedTrainConfig, resize_rule: ResizeRule, step_resize_rules: tuple[ResizeRule, ...]
    ) -> Self:
        """Build the view of a training run.

        Args:
            config: Configuration of the run.
            resize_rule: The model's resize at `image_size`.
            step_resize_rules: The model's resize at each size of `multi_scale`.
        """
        return cls(
            resize_rule=resize_rule,
            augmentation=config.augmentation,
            seed=config.seed,
            plain_from_epoch=config.epochs - config.close_mosaic,
            step_resize_rules=step_resize_rules,
        )

    def mixes(self, epoch: int) -> bool:
        """Return True if images are mixed with partners in an epoch."""
        return self.augmentation == "strong" and not self._is_plain(epoch)

    def step_resize_rule(self, epoch: int, step: int) -> ResizeRule:
        """Return the resize for all images of a training step, the same on all ranks."""
        if self._is_plain(epoch) or not self.step_resize_rules:
            return self.resize_rule
        return self.step_resize_rules[scale_choice(self.seed, epoch, step, len(self.step_resize_rules))]

    def plain(self, row: Mapping[str, Any]) -> SeenImage:
        """Decode and resize an image without augmentation, as in validation and scoring; the result has no boxes.

        Args:
            row: A row of an images table, with `image`.

        Raises:
            DecodeError: The image cannot be read.
        """
        image, size_hw = decoded(image_bytes(row["image"]), max_pixels=self.max_pixels)
        nothing = np.zeros((0, 4), np.float32), np.zeros(0, np.int64)
        return SeenImage(_planes(image, self.resize_rule), size_hw, *nothing)

    def augmented(self, row: Mapping[str, Any], *, epoch: int, resize_rule: ResizeRule) -> SeenImage:
        """Decode, augment and resize an image, as in a training step.

        Without augmentation, the pixels are those of `plain`. Otherwise, larger images are shrunk to `working_size`
        first; a JPEG is decoded at reduced scale.

        Args:
            row: A row of an images table, with `image_id`, `image` and `objects`; optionally with
                `labelled_categories`; with `teacher`, see `raydet.augmentation.taught`; with `height` and `width`,
                without which JPEGs are decoded at full size; with `repetition`, how often the epoch has shown the image
                before; and with `mosaic` and `mixup`, the rows of the partners. Unreadable partners are omitted.
            epoch: Epoch, counted from 0.
            resize_rule: The resize of the training step, see `step_resize_rule`.

        Raises:
            DecodeError: The image cannot be read.
        """
        from raydet.augmentation.samples import Partners
        from raydet.augmentation.taught import without_teacher
        from raydet.augmentation.transforms import plain_of

        spec = plain_of(self.augmentation) if self._is_plain(epoch) else self.augmentation
        working_size = None if spec == "none" else self._working_size(epoch)
        # An image of the model's size fills its tile of a mosaic without loss, even at the largest zoom.
        tile_size = working_size and replace(working_size, oversampling=1.0)
        sample, size_hw = _read(row, self.max_pixels, tile_size if row.get("mosaic") else working_size)
        mosaic, mixup = (row.get(role) or () for role in ("mosaic", "mixup"))
        parts: dict[int, Mapping[str, Any]] = {0: row}
        partners = Partners(
            self._readable(mosaic, tile_size, parts, first=1),
            self._readable(mixup, tile_size, parts, first=1 + len(mosaic)),
        )
        seed = augmentation_seed(self.seed, epoch, row["image_id"], row.get("repetition", 0))
        sample = _augmenter(json.dumps(spec), working_size)(sample, seed=seed, partners=partners)
        sample, taught = without_teacher(sample, parts)
        # A crowd box covers many objects, so it is not a target for a single query.
        kept, labelled = ~sample.iscrowd, None
        if sample.labelled is not None:
            labelled = np.array(sorted(sample.labelled), np.int64)
            kept &= np.isin(sample.categories, labelled)
        return SeenImage(
            _planes(sample.image, resize_rule),
            size_hw,
            xywh_to_normalised_cxcywh(sample.boxes_xywh, sample.size_hw).astype(np.float32)[kept],
            sample.categories[kept],
            labelled,
            taught,
        )

    def _working_size(self, epoch: int) -> "WorkingSize":
        """Return the size at which images are augmented; the same for all steps of an epoch, as augmentation is."""
        from raydet.augmentation.samples import WorkingSize

        rules = (self.resize_rule, *(() if self._is_plain(epoch) else self.step_resize_rules))
        return WorkingSize(max(rules, key=ResizeRule.most_pixels))

    def _is_plain(self, epoch: int) -> bool:
        return self.plain_from_epoch is not None and epoch >= self.plain_from_epoch

    def _readable(
        self,
        rows: Sequence[Mapping[str, Any]],
        working_size: "WorkingSize | None",
        parts: dict[int, Mapping[str, Any]],
        *,
        first: int,
    ) -> "tuple[Sample, ...]":
        """Return the readable partners, and add their rows to `parts`, numbered from `first`.

        Unreadable images are reported when their own turn comes.
        """
        samples, pixels_left = [], self.max_pixels  # all partners are in memory together
        for part, row in enumerate(rows, first):
            with contextlib.suppress(DecodeError):
                sample, _ = _read(row, max(1, pixels_left), working_size, part)
                pixels_left -= sample.image.shape[0] * sample.image.shape[1]
                samples.append(sample)
                parts[part] = row
        return tuple(samples)


def _read(
    row: Mapping[str, Any], max_pixels: int, working_size: "WorkingSize | None", part: int = 0
) -> "tuple[Sample, SizeHW]":
    """Decode the image of a row, shrink it to the working size, and return it and its full height and width.

    `part` is its number among the images that are mixed.
    """
    from raydet.augmentation.samples import rescaled, sample_of, shrunk
    from raydet.augmentation.taught import with_teacher

    data = image_bytes(row["image"])
    if working_size is None:
        image, size_hw = decoded(data, max_pixels=max_pixels)
        return with_teacher(sample_of(image, row), row, part), size_hw
    # To read the size from the file takes as long as to decode a small image: the table tells where it is worthwhile.
    stated_hw = (row.get("height") or 1, row.get("width") or 1)
    is_large = all(side >= 2 * least for side, least in zip(stated_hw, working_size.least_hw(stated_hw), strict=True))
    image, size_hw = decoded(data, max_pixels=max_pixels, reduce_to=working_size.least_hw if is_large else None)
    sample = with_teacher(sample_of(image, row), row, part)
    # Every pixel covers exactly this many of the full image, if the last row and column are thought complete.
    reduction = round(max(size_hw) / max(sample.size_hw))
    if reduction > 1:
        sample = rescaled(sample, image, (1 / reduction, 1 / reduction))
    return shrunk(sample, working_size.fitted_hw(sample.size_hw)), size_hw


def decoded(
    data: bytes, *, max_pixels: int, reduce_to: Callable[[SizeHW], SizeHW] | None = None
) -> tuple[Image, SizeHW]:
    """Decode an image, optionally at a reduced size.

    Args:
        data: The encoded image.
        max_pixels: Larger images are refused.
        reduce_to: Given the full height and width, the height and width that are needed. JPEGs may then be decoded at a
            smaller size that has them.

    Returns:
        uint8 RGB [H, W, 3], and height and width in pixels of the full-size upright image.

    Raises:
        DecodeError: The image cannot be read.
    """
    if reduce_to is None:
        image = decode(data, max_pixels=max_pixels)
        return image, (image.shape[0], image.shape[1])
    size_hw = upright_size_hw(data)
    return decode(data, max_pixels=max_pixels, at_least_hw=reduce_to(size_hw)), size_hw


def _planes(image: Image, rule: ResizeRule) -> Image:
    return resized_planes(image, rule.target_size_hw((image.shape[0], image.shape[1])), rule.resample)


def augmentation_seed(seed: int, epoch: int, image_id: int, repetition: int = 0) -> int:
    """Return the seed of an image's augmentation, which is independent of workers and order.

    Args:
        seed: Seed of the run.
        epoch: Epoch, from 0.
        image_id: Id of the image.
        repetition: How often the epoch has shown the image before.
    """
    words = [seed, epoch, image_id, *((repetition,) if repetition else ())]
    return int(np.random.SeedSequence(words).generate_state(1)[0])


def scale_choice(seed: int, epoch: int, step: int, num_scales: int) -> int:
    """Choose the image size of an optimizer step, the same on all ranks.

    Returns:
        An index from 0 to `num_scales` - 1.
    """
    return int(np.random.default_rng([seed, epoch, step, _SCALE_STREAM]).integers(num_scales))


@lru_cache(maxsize=4)
def _augmenter(spec_json: str, working_size: "WorkingSize | None") -> "Augmenter":
    from raydet.augmentation.transforms import Augmenter

    return Augmenter(json.loads(spec_json), working_size)

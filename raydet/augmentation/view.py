"""The view: encoded image → decode → (augment) → resize → model input.

Training, validation, scoring, inspection and the benchmarks all use this module, so they see the same pixels.
OpenCV and albumentations are imported only for augmentations that need them, torch only to resize.
"""

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from raydet.common.boxes import xywh_to_normalised_cxcywh
from raydet.config import DEFAULT_MAX_PIXELS, AugmentationSpec, ResolvedTrainConfig
from raydet.images.decode import DecodeError, decode, upright_size_hw
from raydet.images.references import image_bytes
from raydet.models.geometry import Image, ResizeRule, SizeHW, resize, resized_planes

if TYPE_CHECKING:
    from raydet.augmentation.mixing import Sample
    from raydet.augmentation.transforms import Augmenter

_SCALE_STREAM = 2
"""Last word of the seed for a step's image size; `ordering` has those of other random choices."""


@dataclass(frozen=True)
class SeenImage:
    """Model input for one image, with its targets.

    Attributes:
        planes: uint8 RGB [3, H, W] at the model's size, without padding.
        original_size_hw: Height and width in pixels of the upright image before augmentation and resize.
        boxes_cxcywh: Boxes normalised to the image, float32 [N, 4]; crowd boxes are excluded.
        categories: Category indices, int64 [N].
    """

    planes: Image
    original_size_hw: SizeHW
    boxes_cxcywh: npt.NDArray[np.float32]
    categories: npt.NDArray[np.int64]

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

        Args:
            row: A row of an images table, with `image` and the fields that `augment` needs.
            epoch: Epoch, counted from 0.
            resize_rule: The resize of the training step, see `step_resize_rule`.

        Raises:
            DecodeError: The image cannot be read.
        """
        image, _ = decoded(image_bytes(row["image"]), max_pixels=self.max_pixels)
        return self.augment(image, row, epoch=epoch, resize_rule=resize_rule)

    def augment(self, image: Image, row: Mapping[str, Any], *, epoch: int, resize_rule: ResizeRule) -> SeenImage:
        """Augment and resize a decoded image, as in a training step.

        Args:
            image: The upright image at full size, uint8 RGB [H, W, 3]; it is not modified.
            row: Its row in the images table, with `image_id` and `objects`; optionally with `mosaic` and `mixup`, the
                rows of the partners. Unreadable partners are omitted.
            epoch: Epoch, counted from 0.
            resize_rule: The resize of the training step, see `step_resize_rule`.
        """
        from raydet.augmentation.mixing import Partners, sample_of
        from raydet.augmentation.transforms import plain_of

        spec = plain_of(self.augmentation) if self._is_plain(epoch) else self.augmentation
        partners = Partners(mosaic=self._readable(row.get("mosaic")), mixup=self._readable(row.get("mixup")))
        sample = _augmenter(json.dumps(spec))(
            sample_of(image, row["objects"]),
            seed=augmentation_seed(self.seed, epoch, row["image_id"]),
            partners=partners,
        )
        # A crowd box covers many objects, so it is not a target for a single query.
        kept = ~sample.iscrowd
        return SeenImage(
            _planes(sample.image, resize_rule),
            (image.shape[0], image.shape[1]),
            xywh_to_normalised_cxcywh(sample.boxes_xywh, sample.size_hw).astype(np.float32)[kept],
            sample.categories[kept],
        )

    def _is_plain(self, epoch: int) -> bool:
        return self.plain_from_epoch is not None and epoch >= self.plain_from_epoch

    def _readable(self, rows: Sequence[Mapping[str, Any]] | None) -> "tuple[Sample, ...]":
        """Return the readable partners; unreadable images are reported when their own turn comes."""
        from raydet.augmentation.mixing import sample_of

        samples, pixels_left = [], self.max_pixels  # all partners are in memory together
        for row in rows or ():
            with contextlib.suppress(DecodeError):
                image, (height, width) = decoded(image_bytes(row["image"]), max_pixels=max(1, pixels_left))
                pixels_left -= height * width
                samples.append(sample_of(image, row["objects"]))
        return tuple(samples)


def decoded(data: bytes, *, max_pixels: int, reduce_to: ResizeRule | None = None) -> tuple[Image, SizeHW]:
    """Decode an image, optionally at a reduced size.

    Args:
        data: The encoded image.
        max_pixels: Larger images are refused.
        reduce_to: If given, JPEGs may be decoded at a smaller size, but not below the target size of this rule.

    Returns:
        uint8 RGB [H, W, 3], and height and width in pixels of the full-size upright image.

    Raises:
        DecodeError: The image cannot be read.
    """
    if reduce_to is None:
        image = decode(data, max_pixels=max_pixels)
        return image, (image.shape[0], image.shape[1])
    size_hw = upright_size_hw(data)
    return decode(data, max_pixels=max_pixels, at_least_hw=reduce_to.target_size_hw(size_hw)), size_hw


def resized(image: Image, rule: ResizeRule) -> Image:
    """Resize an image, uint8 [H, W, 3], to the model's input size."""
    return resize(image, rule.target_size_hw((image.shape[0], image.shape[1])), rule.resample)


def _planes(image: Image, rule: ResizeRule) -> Image:
    return resized_planes(image, rule.target_size_hw((image.shape[0], image.shape[1])), rule.resample)


def augmentation_seed(seed: int, epoch: int, image_id: int) -> int:
    """Return the seed of an image's augmentation, which is independent of workers and order."""
    return int(np.random.SeedSequence([seed, epoch, image_id]).generate_state(1)[0])


def scale_choice(seed: int, epoch: int, step: int, num_scales: int) -> int:
    """Choose the image size of an optimizer step, the same on all ranks.

    Returns:
        An index from 0 to `num_scales` - 1.
    """
    return int(np.random.default_rng([seed, epoch, step, _SCALE_STREAM]).integers(num_scales))


@lru_cache(maxsize=4)
def _augmenter(spec_json: str) -> "Augmenter":
    from raydet.augmentation.transforms import Augmenter

    return Augmenter(json.loads(spec_json))

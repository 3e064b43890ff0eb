"""The view: what a model sees of an image. Encoded image → decode → (augment) → resize → pixels at the model's size.

Training, validation, scoring, inspection, planning and the benchmarks all see images through this module, so that
they see the same pixels. OpenCV and albumentations are imported only for an augmentation that needs them, torch only
to resize.
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
from raydet.config import DEFAULT_MAX_PIXELS, AugmentationSpec, TrainConfig
from raydet.images.decode import DecodeError, decode, upright_size_hw
from raydet.images.references import image_bytes
from raydet.models.geometry import Image, ResizeRule, SizeHW, resize

if TYPE_CHECKING:
    from raydet.augmentation.mixing import Sample
    from raydet.augmentation.transforms import Augmenter

_SCALE_STREAM = 2
"""Last word of the seed that chooses a step's size; `ordering` has those of other draws."""


@dataclass(frozen=True)
class SeenImage:
    """An image as a model sees it.

    Attributes:
        image: uint8 RGB [H, W, 3] at the model's size, without padding.
        original_size_hw: Height and width in pixels of the upright image before augmentation and resize.
        boxes_cxcywh: Normalised to the image, float32 [N, 4]; without crowd boxes.
        categories: Category indices, int64 [N].
    """

    image: Image
    original_size_hw: SizeHW
    boxes_cxcywh: npt.NDArray[np.float32]
    categories: npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class View:
    """The path of an image from its table to the model, in training and validation.

    Attributes:
        resize_rule: The model's own resize.
        max_pixels: Larger pictures count as unreadable.
        augmentation: A preset's name, or a pipeline of albumentations.
        seed: Seed of the augmentation and of the choice among `step_resize_rules`.
        plain_from_epoch: From this epoch on, counted from 0, images are only flipped and have one size; None for
            never.
        step_resize_rules: Each earlier training step draws one of these; empty means `resize_rule`.
    """

    resize_rule: ResizeRule
    max_pixels: int = DEFAULT_MAX_PIXELS
    augmentation: AugmentationSpec = "none"
    seed: int = 0
    plain_from_epoch: int | None = None
    step_resize_rules: tuple[ResizeRule, ...] = ()

    @classmethod
    def of_training(
        cls, config: TrainConfig, resize_rule: ResizeRule, step_resize_rules: tuple[ResizeRule, ...]
    ) -> Self:
        """Builds the view that a training with this config has.

        Args:
            config: The training.
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
        """Return whether images are mixed with partners in this epoch."""
        return self.augmentation == "strong" and not self._is_plain(epoch)

    def step_resize_rule(self, epoch: int, step: int) -> ResizeRule:
        """Return the resize of all images of a training step, the same on all ranks."""
        if self._is_plain(epoch) or not self.step_resize_rules:
            return self.resize_rule
        return self.step_resize_rules[scale_choice(self.seed, epoch, step, len(self.step_resize_rules))]

    def plain(self, row: Mapping[str, Any]) -> SeenImage:
        """Decode and resize an image without augmentation, as validation and scoring do; boxes are left out.

        Args:
            row: A row of an images table; `image` is read.

        Raises:
            DecodeError: The image cannot be read.
        """
        image, size_hw = decoded(image_bytes(row["image"]), max_pixels=self.max_pixels)
        nothing = np.zeros((0, 4), np.float32), np.zeros(0, np.int64)
        return SeenImage(resized(image, self.resize_rule), size_hw, *nothing)

    def augmented(self, row: Mapping[str, Any], *, epoch: int, resize_rule: ResizeRule) -> SeenImage:
        """Decode, augment and resize an image, as a training step does.

        Args:
            row: A row of an images table; `image_id`, `image` and `objects` are read and, where they are there,
                `mosaic` and `mixup`: the rows that the image is mixed with. Unreadable partners are left out.
            epoch: Counted from 0.
            resize_rule: The resize of the image's training step, see `step_resize_rule`.

        Raises:
            DecodeError: The image cannot be read.
        """
        from raydet.augmentation.mixing import Partners, sample_of
        from raydet.augmentation.transforms import plain_of

        image, size_hw = decoded(image_bytes(row["image"]), max_pixels=self.max_pixels)
        spec = plain_of(self.augmentation) if self._is_plain(epoch) else self.augmentation
        partners = Partners(mosaic=self._readable(row.get("mosaic")), mixup=self._readable(row.get("mixup")))
        sample = _augmenter(json.dumps(spec))(
            sample_of(image, row["objects"]),
            seed=augmentation_seed(self.seed, epoch, row["image_id"]),
            partners=partners,
        )
        # A crowd box covers many objects: no single query can learn it.
        kept = ~sample.iscrowd
        return SeenImage(
            resized(sample.image, resize_rule),
            size_hw,
            xywh_to_normalised_cxcywh(sample.boxes_xywh, sample.size_hw).astype(np.float32)[kept],
            sample.categories[kept],
        )

    def _is_plain(self, epoch: int) -> bool:
        return self.plain_from_epoch is not None and epoch >= self.plain_from_epoch

    def _readable(self, rows: Sequence[Mapping[str, Any]] | None) -> "tuple[Sample, ...]":
        """The partners that can be read; the others are reported when it is their own turn."""
        from raydet.augmentation.mixing import sample_of

        samples = []
        for row in rows or ():
            with contextlib.suppress(DecodeError):
                image, _ = decoded(image_bytes(row["image"]), max_pixels=self.max_pixels)
                samples.append(sample_of(image, row["objects"]))
        return tuple(samples)


def decoded(data: bytes, *, max_pixels: int, reduce_to: ResizeRule | None = None) -> tuple[Image, SizeHW]:
    """Decode an image, on request only as large as a model needs it.

    Args:
        data: The encoded image.
        max_pixels: Larger pictures are refused.
        reduce_to: With a rule, JPEGs may come smaller, but not below the size that the rule resizes them to.

    Returns:
        uint8 RGB [H, W, 3], and height and width in pixels of the upright image, of which a reduced JPEG has fewer.

    Raises:
        DecodeError: The image cannot be read.
    """
    if reduce_to is None:
        image = decode(data, max_pixels=max_pixels)
        return image, (image.shape[0], image.shape[1])
    size_hw = upright_size_hw(data)
    return decode(data, max_pixels=max_pixels, at_least_hw=reduce_to.target_size_hw(size_hw)), size_hw


def resized(image: Image, rule: ResizeRule) -> Image:
    """Resize an image, uint8 [H, W, 3], to the size at which the model sees it."""
    return resize(image, rule.target_size_hw((image.shape[0], image.shape[1])), rule.resample)


def augmentation_seed(seed: int, epoch: int, image_id: int) -> int:
    """Return the seed of an image's augmentation: it depends on nothing else, so not on workers or order."""
    return int(np.random.SeedSequence([seed, epoch, image_id]).generate_state(1)[0])


def scale_choice(seed: int, epoch: int, step: int, num_scales: int) -> int:
    """Choose one of several image sizes for an optimizer step, the same on all ranks.

    Returns:
        A number from 0 to `num_scales` - 1.
    """
    return int(np.random.default_rng([seed, epoch, step, _SCALE_STREAM]).integers(num_scales))


@lru_cache(maxsize=4)
def _augmenter(spec_json: str) -> "Augmenter":
    from raydet.augmentation.transforms import Augmenter

    return Augmenter(json.loads(spec_json))

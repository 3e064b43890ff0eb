"""The resize from an upright image to the input of a model: its target size and the operation itself.

Both match the model's own image processor exactly, so that training, inference and plain transformers see the same
pixels. A rule is plain data, so that workers that decode images can compute sizes without torch or transformers.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Tensor

Image = npt.NDArray[np.uint8]

SizeHW = tuple[int, int]

BILINEAR = 2
"""PIL's resampling code of most models' resize."""
LANCZOS = 1
"""PIL's resampling code of the only mode that torch does not have on GPUs."""
_TORCH_MODES = {2: "bilinear", 3: "bicubic"}
_NATIVE_UINT8 = ("AVX2", "AVX512")
"""CPUs on which torch resizes uint8 images without a detour through floats."""
_LARGEST_PADDING_STEP = 32
_PADDING_STEPS_OF_A_SIDE = 16


@dataclass(frozen=True, kw_only=True)
class ResizeRule:
    """The resize of a model's image processor.

    Attributes:
        mode: `fixed` resizes every image to exactly `size_hw`; `keep_aspect` scales both sides by the same factor.
        size_hw: Height and width in pixels, for `fixed`.
        shortest: For `keep_aspect`: length of the shorter side in pixels, unless `longest` limits it.
        longest: For `keep_aspect`: maximum length of the longer side in pixels.
        limit_hw: For `keep_aspect` without `shortest`: maximum height and width in pixels.
        resample: PIL's resampling code (0 nearest, 1 Lanczos, 2 bilinear, 3 bicubic).
        pad_to_hw: Height and width in pixels to which every image is padded; None pads to the largest of the batch.
        multiple_of: With `shortest`: both sides are rounded down to a multiple of this.
    """

    mode: Literal["fixed", "keep_aspect"]
    size_hw: SizeHW | None = None
    shortest: int | None = None
    longest: int | None = None
    limit_hw: SizeHW | None = None
    resample: int = 2
    pad_to_hw: SizeHW | None = None
    multiple_of: int = 1

    def __post_init__(self) -> None:
        if self.mode == "fixed":
            assert self.size_hw is not None, "a fixed rule needs size_hw"
        else:
            pair = self.shortest is not None and self.longest is not None
            assert pair != (self.limit_hw is not None), "a keep_aspect rule has shortest and longest, or limit_hw"

    def target_size_hw(self, size_hw: SizeHW) -> SizeHW:
        """Return the size in pixels to which an image of this size is resized, at least 1 × 1.

        The arithmetic, rounding included, is that of the Hugging Face image processors.
        """
        if self.mode == "fixed":
            assert self.size_hw is not None
            return self.size_hw
        if self.limit_hw is not None:
            height, width = self._within_limit(size_hw, self.limit_hw)
        else:
            height, width = self._by_edges(size_hw)
        # The processor fails on a very narrow image whose side would round to zero; a batch job must not.
        return max(height, self.multiple_of), max(width, self.multiple_of)

    def most_pixels(self) -> int:
        """Return the maximum number of pixels of a resized image."""
        if self.pad_to_hw or self.size_hw or self.limit_hw:
            height, width = self.pad_to_hw or self.size_hw or self.limit_hw or (0, 0)
            return height * width
        return (self.shortest or 0) * (self.longest or 0)

    def padded_size_hw(self, target_hw: SizeHW) -> SizeHW:
        """Return the padded size of an image, in pixels, from its target size; other images do not matter.

        Without `pad_to_hw`, sides are padded to a multiple of 32 or, for small images, of the largest power of two
        that is at most a sixteenth of the shorter side. Images of similar shape thus share a size with little padding.

        Args:
            target_hw: Result of `target_size_hw` for the image.
        """
        if self.pad_to_hw is not None:
            return self.pad_to_hw
        if self.mode == "fixed":
            return target_hw
        shorter = self.shortest or min(self.limit_hw or target_hw)
        step = min(_LARGEST_PADDING_STEP, 2 ** int(math.log2(max(shorter / _PADDING_STEPS_OF_A_SIDE, 1))))
        height, width = (-(-side // step) * step for side in target_hw)
        return height, width

    @staticmethod
    def _within_limit(size_hw: SizeHW, limit_hw: SizeHW) -> SizeHW:
        scale = min(limit_hw[0] / size_hw[0], limit_hw[1] / size_hw[1])
        return int(size_hw[0] * scale), int(size_hw[1] * scale)

    def _by_edges(self, size_hw: SizeHW) -> SizeHW:
        assert self.shortest is not None and self.longest is not None
        short, long = float(min(size_hw)), float(max(size_hw))
        new_short: int = self.shortest
        exact_short: float = self.shortest
        if long / short * self.shortest > self.longest:
            exact_short = self.longest * short / long
            new_short = round(exact_short)
        height, width = size_hw
        unchanged = min(size_hw) == new_short
        if self.multiple_of > 1:
            # The processor of YOLOS rescales a portrait image even if its short side already fits.
            unchanged = unchanged and height <= width
        if unchanged:
            new_hw = (height, width)
        elif width < height:
            new_hw = (int(exact_short * height / width), new_short)
        else:
            new_hw = (new_short, int(exact_short * width / height))
        return new_hw[0] - new_hw[0] % self.multiple_of, new_hw[1] - new_hw[1] % self.multiple_of

    def to_dict(self) -> dict[str, Any]:
        """Return the rule as JSON-compatible values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "ResizeRule":
        """Build a rule from the result of `to_dict`, even after JSON has turned its tuples into lists."""
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in content.items()
        }
        return cls(**values)


class PixelBuffer:
    """Memory for pixels, one image or batch after another; it can be reused, as fresh pages cost more than the copy."""

    def __init__(self, num_bytes: int = 0) -> None:
        """Allocate memory for a number of bytes, which grows if it is not enough."""
        self._memory, self._size = np.empty(num_bytes, np.uint8), 0

    def clear(self) -> None:
        """Start anew; earlier arrays become invalid."""
        self._size = 0

    def append(self, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
        """Return the next bytes as an uninitialised array of this shape; valid until the next call."""
        start, self._size = self._size, self._size + math.prod(shape)
        if self._size > len(self._memory):
            grown = np.empty(max(self._size, 2 * len(self._memory)), np.uint8)
            grown[:start] = self._memory[:start]
            self._memory = grown
        return self._memory[start : self._size].reshape(shape)

    @property
    def content(self) -> npt.NDArray[np.uint8]:
        """All bytes since the last `clear`."""
        return self._memory[: self._size]


def fill_padded(canvas: Image, planes: Sequence[Image]) -> None:
    """Copy images into the upper left corners of a batch, with zeros at the bottom and on the right.

    Args:
        canvas: uint8 [B, 3, H, W], with any content.
        planes: B images, uint8 [3, h, w], no larger than the batch.
    """
    if any(image.shape[1:] != canvas.shape[2:] for image in planes):
        canvas[:] = 0
    for target, image in zip(canvas, planes, strict=True):
        target[:, : image.shape[1], : image.shape[2]] = image


def resize(image: Image, size_hw: SizeHW, resample: int) -> Image:
    """Resize uint8 [H, W, 3] as the Hugging Face image processors (torchvision's) do, with PIL's resampling code.

    Returns:
        uint8 [height, width, 3], bit for bit equal to the result of the image processor on a CPU; the image itself if
        it already has this size.
    """
    if image.shape[:2] == tuple(size_hw):
        return image
    return np.asarray(_resized(image, size_hw, resample).permute(1, 2, 0).contiguous().numpy())


def resized_planes(image: Image, size_hw: SizeHW, resample: int) -> Image:
    """Resize as `resize` does, but return uint8 [3, height, width], which may be a view of interleaved channels.

    Callers copy it into a batch of planes, the layout in which models take images.
    """
    if image.shape[:2] == tuple(size_hw):
        return image.transpose(2, 0, 1)
    return np.asarray(_resized(image, size_hw, resample).numpy())


def _resized(image: Image, size_hw: SizeHW, resample: int) -> "Tensor":
    """Resize uint8 [H, W, 3]; return [3, height, width] in any memory layout."""
    import torch

    if resample in _TORCH_MODES and torch.backends.cpu.get_cpu_capability() in _NATIVE_UINT8:
        # The same call as torchvision's, whose import takes seconds in every decoder. Interleaved channels give the
        # same bits as planes in a third of the time.
        source = torch.from_numpy(np.require(image, requirements=("C", "W"))).permute(2, 0, 1)
        mode = _TORCH_MODES[resample]
        resized: Tensor = torch.nn.functional.interpolate(
            source[None], list(size_hw), mode=mode, align_corners=False, antialias=True
        )[0]
        return resized
    # Contiguous planes: torch rounds differently for interleaved channels.
    return _resized_by_torchvision(torch.from_numpy(np.array(image.transpose(2, 0, 1), order="C")), size_hw, resample)


def resized_on_device(planes: "Tensor", size_hw: SizeHW, resample: int) -> "Tensor":
    """Resize in float32 on the device that holds an image, as the Hugging Face image processors do on a GPU.

    Args:
        planes: uint8 [3, H, W].
        size_hw: New height and width in pixels.
        resample: PIL's resampling code; on a GPU not `LANCZOS`.

    Returns:
        uint8 [3, height, width]; the image itself if it already has this size. Bilinear values are within 1 of those
        of `resized_planes`, which rounds after each of two passes; bicubic ones may differ more where they overshoot.
    """
    if tuple(planes.shape[1:]) == tuple(size_hw):
        return planes
    import torch

    values = planes.to(torch.float32, memory_format=torch.contiguous_format)
    return _resized_by_torchvision(values, size_hw, resample).clamp_(0, 255).round_().to(torch.uint8)


def _resized_by_torchvision(planes: "Tensor", size_hw: SizeHW, resample: int) -> "Tensor":
    from torchvision.transforms.v2 import InterpolationMode, functional

    interpolation = InterpolationMode.NEAREST_EXACT if resample == 0 else resample
    resized: Tensor = functional.resize(planes, list(size_hw), interpolation=interpolation, antialias=True)
    return resized

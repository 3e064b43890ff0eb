"""A detector as a graph of tensor operations for other runtimes, and the inputs to trace it with."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from raydet.models.detector import Detector
from raydet.models.geometry import SizeHW

OUTPUT_NAMES = ("logits", "pred_boxes")


_EXAMPLE_IMAGE_HW = (480, 640)
"""If sizes vary, the graph is traced with an image of this shape; its sides differ, to keep height and width apart."""


class Graph(nn.Module):
    """Normalised pixels → logits [B, Q, C] and boxes [B, Q, 4], centre form relative to the image."""

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.model = detector.model

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Run the model.

        Args:
            pixel_values: float32 [B, 3, H, W], zero in the padding.
            pixel_mask: int64 [B, H, W], 1 in the image and 0 in its padding; only for models that
                use a mask and have padding.
        """
        inputs = {"pixel_values": pixel_values}
        if pixel_mask is not None:
            inputs["pixel_mask"] = pixel_mask
        outputs = self.model(**inputs)
        return outputs.logits, outputs.pred_boxes


def fixed_size_hw(detector: Detector) -> SizeHW | None:
    """Return height and width in pixels of every input of the model, padding included; None if they vary."""
    return detector.resize_rule.pad_to_hw or detector.resize_rule.size_hw


def input_names(detector: Detector) -> tuple[str, ...]:
    """Return `pixel_values` and, for models that use a mask and have padding, `pixel_mask`."""
    rule = detector.resize_rule
    has_padding = rule.mode == "keep_aspect" or rule.pad_to_hw not in (None, rule.size_hw)
    return ("pixel_values", "pixel_mask") if detector.family.uses_pixel_mask and has_padding else ("pixel_values",)


def example_inputs(detector: Detector, batch_size: int, *, seed: int) -> tuple[Tensor, ...]:
    """Make plausible random inputs in the order of `input_names`; if there are several images, the last is padded."""
    height, width = fixed_size_hw(detector) or detector.resize_rule.target_size_hw(_EXAMPLE_IMAGE_HW)
    generator = torch.Generator().manual_seed(seed)
    # Coarse blocks, because all parts of white noise look alike and give the model nothing to select.
    blocks = torch.randn((batch_size, 3, 8, 8), generator=generator)
    pixels = nn.functional.interpolate(blocks, size=(height, width), mode="bilinear")
    if "pixel_mask" not in input_names(detector):
        return (pixels,)
    mask = torch.ones((batch_size, height, width), dtype=torch.int64)
    if batch_size > 1:
        mask[-1, height * 3 // 4 :] = 0
    return pixels * mask[:, None], mask


@contextlib.contextmanager
def traceable(detector: Detector) -> Iterator[Graph]:
    """Context manager: yield the graph of a detector, which can be traced while the block runs."""
    graph = Graph(detector).eval()
    if not detector.family.resamples_positions:
        yield graph
        return
    # Other runtimes lack the resampling of its position codes. At a fixed size the codes are constant.
    model: Any = detector.model
    embeddings = model.model.backbone.backbone.embeddings
    size_hw = fixed_size_hw(detector)
    assert size_hw is not None, "the sizes of a fixed-size family do not vary"
    height, width = size_hw
    num_patches = (height // embeddings.patch_size) * (width // embeddings.patch_size)
    with torch.no_grad():
        tokens = torch.zeros((1, num_patches + 1, embeddings.position_embeddings.shape[-1]))
        codes = embeddings.interpolate_pos_encoding(tokens, height, width).clone()
    embeddings.interpolate_pos_encoding = lambda *_: codes
    try:
        yield graph
    finally:
        del embeddings.interpolate_pos_encoding

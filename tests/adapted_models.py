"""Adapters of a tiny base with a vision transformer, and the same models merged, as `train --lora` saves both."""

from collections.abc import Sequence
from pathlib import Path

import torch

from raydet.models.loading import build_detector
from raydet.tables.schema import Category

RANK = 4


def save_adapted(
    base: str, folder: Path, classes: Sequence[str], *, seed: int, image_size: int | None = None
) -> tuple[str, str]:
    """Change all that a training with adapters changes by random numbers.

    Returns:
        The folders of the adapter and of the merged model, FOLDER/adapter and FOLDER/checkpoint.
    """
    categories = [Category(number, name) for number, name in enumerate(classes, start=1)]
    detector = build_detector(base, categories, image_size=image_size, seed=seed, lora={"r": RANK})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in detector.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        for name, buffer in detector.model.named_buffers():
            if name.endswith("running_mean"):
                buffer.add_(torch.randn(buffer.shape, generator=generator) * 0.1)
    adapter, merged = folder / "adapter", folder / "checkpoint"
    adapter.mkdir(parents=True)
    detector.save_adapter(str(adapter), base=base)
    detector.save(str(merged))
    return str(adapter), str(merged)

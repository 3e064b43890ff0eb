"""The interface of a model that looks at crops, and the columns of its answers, which need no model to be known."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from raydet.common.errors import UserError
from raydet.config import CropsConfig

Pixels = npt.NDArray[np.uint8]
"""A crop, RGB [height, width, 3]."""


class Looker(Protocol):
    """A loaded model."""

    def look(self, crops: Sequence[Pixels]) -> list[dict[str, Any]]:
        """Return the answer for each of some crops, by column of `answer_fields`."""


_ARCHITECTURES: Mapping[str, tuple[str, ...]] = {
    "image-classification": ("ForImageClassification",),
    "image-text-to-text": (
        "ForConditionalGeneration",
        "ForQuestionAnswering",
        "ForCausalLM",
        "ForImageTextToText",
        "ForVision2Seq",
    ),
    "depth-estimation": ("ForDepthEstimation",),
}
"""Endings of the classes of models, as in `architectures` of their config; any model has features."""
_ONLY_DESCRIBE = ("GitForCausalLM",)
"""Models of `image-text-to-text` whose processors do not prepare questions."""


def check_task(config: CropsConfig, content: Mapping[str, Any]) -> None:
    """Check that a model's `config.json` fits the task, before it is loaded.

    Raises:
        UserError: It does not.
    """
    names, endings = content.get("architectures"), _ARCHITECTURES.get(config.task)
    first = names[0] if isinstance(names, list) and names else None
    if endings and isinstance(first, str) and not first.endswith(endings):
        raise UserError(f"--task {config.task} does not fit --model {config.model}, which is a {first}")
    if isinstance(first, str) and first.endswith("ForQuestionAnswering") and not config.ask:
        raise UserError(f"--model {config.model} answers questions; set --ask")
    if first in _ONLY_DESCRIBE and config.ask:
        raise UserError(f"--model {config.model}, which is a {first}, only describes images: omit --ask")
    if config.task == "zero-shot-image-classification" and "text_config" not in content:
        kind = f"a {first}" if isinstance(first, str) else "a model of images alone"
        raise UserError(
            f"--task {config.task} does not fit --model {config.model}, which is {kind}: choose a model of images and "
            "texts, such as CLIP or SigLIP"
        )


def answer_fields(config: CropsConfig) -> list[pa.Field]:
    """Return the columns of a task's answers."""
    if config.task in ("image-classification", "zero-shot-image-classification"):
        texts, numbers = pa.list_(pa.string()), pa.list_(pa.float64())
        return [
            pa.field("label", pa.string()),
            pa.field("label_score", pa.float64()),
            pa.field("labels", texts),
            pa.field("label_scores", numbers),
        ]
    if config.task == "image-text-to-text":
        names = [f"answer_{place}" for place in range(1, len(config.ask) + 1)] if config.ask else ["caption"]
        return [pa.field(name, pa.string()) for name in names]
    if config.task == "image-feature-extraction":
        return [pa.field("embedding", pa.list_(pa.float16()))]
    return [pa.field("depth", pa.float64())]

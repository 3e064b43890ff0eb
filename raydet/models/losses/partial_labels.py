"""Class scores of images that are not labelled for all classes → scores from which nothing unknown is learned.

The change precedes transformers' criterion, so that it holds for every family, layer and kind of query:

- Sigmoid: the score of a class that is not labelled becomes a constant at which its loss is zero, as is its gradient.
- Softmax: the target of a query without an object is the set of "no object" and the classes that are not labelled, and
  its loss is −log of the sum of their probabilities. "No object" therefore takes over their probability. The sum over
  all classes stays the same, and with it the loss of a query that is matched to an object of another class.

A labelled class is never matched by the score of another, so matching is that of the labelled classes alone.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from raydet.models.collate import LABELLED

_SIGMOID_OF_NOTHING = -50.0
"""Its sigmoid is 2e-22: 1 minus it is exactly 1 in double precision; its logarithm is finite in single precision."""
_SOFTMAX_OF_NOTHING = -1e4


def not_labelled(labels: Sequence[Mapping[str, Tensor]], num_classes: int, device: torch.device) -> Tensor | None:
    """Return a mask of the classes that each image is not labelled for, bool [B, C]; None if all are labelled."""
    if not any(LABELLED in label for label in labels):
        return None
    mask = torch.zeros((len(labels), num_classes), dtype=torch.bool)
    for row, label in zip(mask, labels, strict=True):
        if LABELLED in label:
            row.fill_(True)
            row[label[LABELLED].cpu()] = False
    return mask.to(device, non_blocking=True)


def silenced(logits: Tensor, unknown: Tensor) -> Tensor:
    """Replace sigmoid scores by a constant without loss or gradient where a mask that broadcasts to them is True."""
    return logits.masked_fill(unknown, _SIGMOID_OF_NOTHING)


def joined_to_no_object(logits: Tensor, unknown: Tensor) -> Tensor:
    """Give "no object", the last class of a softmax, the probability of the classes in a mask, bool [..., C]."""
    classes, nothing = logits[..., :-1], logits[..., -1:]
    unknown = unknown.expand(classes.shape)
    others = torch.where(unknown, classes, classes.new_tensor(-torch.inf))
    both = torch.cat([others, nothing], dim=-1).logsumexp(-1, keepdim=True)
    joined = torch.where(unknown.any(-1, keepdim=True), both, nothing)
    return torch.cat([classes.masked_fill(unknown, _SOFTMAX_OF_NOTHING), joined], dim=-1)


def without_unknown(
    arguments: Mapping[str, Any], labels: Sequence[Mapping[str, Tensor]], *, softmax: bool, layers_first: bool
) -> dict[str, Any]:
    """Change the class scores among the arguments of a criterion, as the labels of its images require.

    Args:
        arguments: Arguments by name; those with class scores are `logits`, `enc_topk_logits` and `enc_outputs_class`
            [B, Q, C], and `outputs_class`, of all layers.
        labels: Labels of the B images.
        softmax: The last class is "no object".
        layers_first: `outputs_class` is [L, B, Q, C], otherwise [B, L, Q, C].

    Returns:
        All arguments; the same objects if every image is labelled for all classes.
    """
    logits = arguments["logits"]
    unknown = not_labelled(labels, logits.shape[-1] - softmax, logits.device)
    if unknown is None:
        return dict(arguments)
    of_images = unknown[:, None]
    masks = dict.fromkeys(("logits", "enc_topk_logits", "enc_outputs_class"), of_images)
    masks["outputs_class"] = of_images[None] if layers_first else of_images[:, None]
    change = joined_to_no_object if softmax else silenced
    return {
        name: change(value, masks[name]) if name in masks and value is not None else value
        for name, value in arguments.items()
    }

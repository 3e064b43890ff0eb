"""The weights of an adapter in a model: low-rank matrices beside linear layers, and all that is not frozen."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from raydet.common.errors import UserError
from raydet.models.adapters.description import AdapterFolder

_LORA = ".lora_"
_FACTORS = {"A.weight", "B.weight"}


class AdaptedLinear(nn.Module):
    """A linear layer with the weights W + scale · B·A, which are added up in each forward pass.

    Adding up costs r operations for each weight, whereas B·(A·x) beside W·x, as in training, costs as many for each
    weight of A and B and each of the thousands of tokens in a batch. The sums are those of a merged checkpoint in any
    precision, and W itself stays as it is, so that layers of several models share it.

    Attributes:
        weight: W, [outputs, inputs].
        bias: [outputs], or None.
        lora_a: A, [r, inputs].
        lora_b: B, [outputs, r].
    """

    lora_a: Tensor
    lora_b: Tensor

    def __init__(self, layer: nn.Linear, lora_a: Tensor, lora_b: Tensor, scale: float) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.register_buffer("lora_a", lora_a)
        self.register_buffer("lora_b", lora_b)
        self._scale = scale

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the outputs of the layer for inputs [..., inputs]."""
        with torch.autocast(self.weight.device.type, enabled=False):
            weight = self.weight + (self.lora_b @ self.lora_a) * self._scale
        return F.linear(inputs, weight, self.bias)


def put_adapters(model: PreTrainedModel, tensors: Mapping[str, Tensor], base: str, adapter: AdapterFolder) -> None:
    """Load the plain weights of an adapter into a model, and replace its adapted layers, in place.

    Args:
        model: The base, with the classes of the adapter.
        tensors: The first result of `read_weights`.
        base: Name of the base, for messages.
        adapter: The adapter.

    Raises:
        UserError: The weights do not fit the base.
    """
    state = model.state_dict()
    plain = {name: value for name, value in tensors.items() if _LORA not in name}
    wrong = sorted(name for name in plain if name not in state or state[name].shape != plain[name].shape)
    if wrong:
        raise misfit(base, adapter, f"{len(wrong)} of its weights are unknown to the base or of another shape", wrong)
    model.load_state_dict(plain, strict=False)
    layers: dict[str, dict[str, Tensor]] = {}
    for name in tensors.keys() - plain.keys():
        path, _, factor = name.rpartition(_LORA)
        layers.setdefault(path, {})[factor] = tensors[name].to(torch.float32)
    known: dict[str, nn.Module] = dict(model.named_modules())
    for name, factors in sorted(layers.items()):
        layer = known.get(name)
        if layer is None:
            raise misfit(base, adapter, "it adapts a layer that the base does not have", [name])
        if type(layer) is not nn.Linear or factors.keys() != _FACTORS:
            raise UserError(
                f"--adapter {adapter.uri} adapts {name} in a way that raydet does not support ({', '.join(factors)} of "
                f"{type(layer).__name__}): merge it with peft, and give the result as --checkpoint"
            )
        lora_a, lora_b = factors["A.weight"], factors["B.weight"]
        shapes = (adapter.rank, layer.in_features), (layer.out_features, adapter.rank)
        if (tuple(lora_a.shape), tuple(lora_b.shape)) != shapes:
            raise misfit(base, adapter, "its matrices do not fit the layers of the base", [name])
        model.set_submodule(name, AdaptedLinear(layer, lora_a, lora_b, adapter.scale))


def misfit(base: str, adapter: AdapterFolder, reason: str, names: Sequence[str] = ()) -> UserError:
    """Make the error for an adapter of another model."""
    example = f", such as {names[0]}" if names else ""
    remedy = f"it names {adapter.base} as its base" if adapter.base else "give the model that it was trained on"
    return UserError(f"--adapter {adapter.uri} does not fit --checkpoint {base}: {reason}{example}; {remedy}")

"""Low-rank adapters in the vision transformer of a detector, and the same model with the adapters merged.

Layers of peft take the place of the linear layers that they adapt. To the optimizer, the moving average, states and
DistributedDataParallel their parameters are like any others.
"""

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from raydet.common.errors import UserError
from raydet.common.packages import require_packages
from raydet.models.backbone import backbone_parameter_names

ADAPTER_NAME = "default"
"""Name of the adapter in peft's layers; peft leaves it out of saved names."""
_MARK = "lora_"
"""Part of the names of all parameters of adapters."""


def add_adapters(model: PreTrainedModel, options: Mapping[str, float], *, seed: int, where: str = "this model") -> str:
    """Freeze the backbone of a model and put adapters into all linear layers of its vision transformer, in place.

    An adapted layer computes W·x + scale · B·A·x, with A of shape [r, inputs] and B of shape [outputs, r] (Hu et al.,
    2021, arXiv:2106.09685). B starts at zero, so that the outputs of the model do not change. Other parameters stay
    trainable if they are now.

    Args:
        model: The model.
        options: As `TrainConfig.lora`: `r`; `alpha`, by default 2 · r, where the scale is alpha / r; and `dropout` of
            the inputs of A, by default 0.
        seed: Seed of A.
        where: The model, for the error message.

    Returns:
        A line with the numbers of parameters that are trained.

    Raises:
        UserError: The backbone has no linear layers, or peft is missing.
    """
    require_packages("lora")
    from peft import inject_adapter_in_model

    frozen = backbone_parameter_names(model)
    layers = _linear_layers(model, frozen)
    if not layers:
        raise UserError(f"--lora adapts vision transformers, but the backbone of {where} has no linear layers")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad} - frozen
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        with untied(model):
            inject_adapter_in_model(_peft_config(layers, options), model)
    # peft leaves nothing but its own parameters trainable.
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained or _MARK in name)
    return _summary(model, int(options["r"]), len(layers))


def _linear_layers(model: nn.Module, backbone: set[str]) -> list[str]:
    return [
        name for name, module in model.named_modules() if type(module) is nn.Linear and f"{name}.weight" in backbone
    ]


def _peft_config(layers: list[str], options: Mapping[str, float]) -> Any:
    from peft import LoraConfig

    rank = int(options["r"])
    return LoraConfig(
        r=rank,
        lora_alpha=int(options.get("alpha", 2 * rank)),
        lora_dropout=float(options.get("dropout", 0.0)),
        target_modules=_pattern(layers),
    )


def _pattern(layers: list[str]) -> str:
    r"""Return a regular expression that matches these names of layers, whose numbers it writes as `\d+`."""
    shapes = dict.fromkeys(re.sub(r"\\\.\d+(?=\\\.|$)", r"\\.\\d+", re.escape(name)) for name in layers)
    return "|".join(shapes)


def _summary(model: nn.Module, rank: int, num_layers: int) -> str:
    sizes = [(_MARK in name, each.numel()) for name, each in model.named_parameters() if each.requires_grad]
    in_adapters, elsewhere = (sum(size for is_own, size in sizes if is_own is kind) for kind in (True, False))
    total = sum(each.numel() for name, each in model.named_parameters() if _MARK not in name)
    return (
        f"LoRA of rank {rank} trains {in_adapters + elsewhere:,} parameters, the full model has {total:,}: "
        f"{in_adapters:,} adapt {num_layers} linear layers of the frozen backbone, {elsewhere:,} are outside of it"
    )


def num_trained(model: nn.Module) -> int:
    """Return the number of trainable parameters of a model."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@contextlib.contextmanager
def untied(model: PreTrainedModel) -> Iterator[None]:
    """Context manager: while the block runs, the config of a model says that no weights are tied.

    peft asks a model with tied weights for its text embeddings, which a detector does not have.
    """
    config: Any = model.config
    ties = getattr(config, "tie_word_embeddings", False)
    if ties:
        config.tie_word_embeddings = False
    try:
        yield
    finally:
        if ties:
            config.tie_word_embeddings = True


@contextlib.contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """Context manager: while the block runs, plain layers with the sum of both weights replace adapted layers.

    Afterwards the model has its adapters back, with every bit as before. A model without adapters is left alone.
    """
    layers = adapted_layers(model)
    for name, layer in layers.items():
        model.set_submodule(name, _merged(layer))
    try:
        yield
    finally:
        for name, layer in layers.items():
            model.set_submodule(name, layer)


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """Return the layers with adapters, by name."""
    if not hasattr(model, "peft_config"):  # set by peft, whose import takes seconds
        return {}
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def _merged(layer: Any) -> nn.Linear:
    base = layer.get_base_layer()
    with torch.no_grad():
        weight = base.weight + layer.get_delta_weight(ADAPTER_NAME)
    plain = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
    plain.weight, plain.bias = nn.Parameter(weight, requires_grad=False), base.bias
    return plain.train(layer.training)

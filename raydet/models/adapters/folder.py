"""Adapters in a folder of peft's own format, together with all other weights that the training has changed."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from raydet.common.errors import UserError, first_line
from raydet.models.adapters.description import ADAPTER_WEIGHTS
from raydet.models.adapters.lora import ADAPTER_NAME
from raydet.models.backbone import backbone_parameter_names
from raydet.models.checkpoints import ADAPTER_CONFIG

_DIGEST_KEY = "raydet_frozen_weights"
"""Metadata of the file of weights: the digest of those that are frozen and therefore not in it."""
_VALUES_PER_TENSOR = 1024
_BASE_LAYER = ".base_layer."
"""Part of the names of a layer's own weights once peft has put adapters beside them."""
_PREFIX = "base_model.model."
"""Prefix of all names in peft's files."""


def write_adapter(model: PreTrainedModel, folder: str, *, base: str) -> None:
    """Write the adapters of a model and all its weights outside the frozen backbone, in peft's format.

    `peft.PeftModel.from_pretrained(plain, folder)` then gives the outputs of the merged model, if `plain` is the base
    with the config of the merged model. Weights without adapters have the names that they have in the base, into which
    peft loads them. Its `modules_to_save` cannot hold them: peft matches names by their ends, so that `class_embed`
    also means the list `model.enc_out_class_embed`, which it refuses.

    Args:
        model: Model with adapters.
        folder: Folder that exists.
        base: Name of the model whose weights are frozen.
    """
    config = model.peft_config[ADAPTER_NAME]
    config.base_model_name_or_path, was_inference = base, config.inference_mode
    config.inference_mode = True
    try:
        config.save_pretrained(folder)
    finally:
        config.inference_mode = was_inference
    weights = Path(folder, ADAPTER_WEIGHTS)
    changed, frozen = _changed_weights(model), _frozen_weights(model)
    save_file(changed, weights, metadata={"format": "pt", _DIGEST_KEY: digest_of(frozen)})
    # safetensors makes files private; the others follow the umask.
    weights.chmod(Path(folder, ADAPTER_CONFIG).stat().st_mode & 0o777)


def _changed_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return copies of all tensors but those of the frozen backbone, under peft's names."""
    frozen = {name for name, _ in _frozen_parameters(model)}
    # A tensor with two names is written twice, because `untied` separates them.
    return {
        _PREFIX + name.replace(f".{ADAPTER_NAME}.", "."): value.detach().cpu().contiguous().clone()
        for name, value in model.state_dict().items()
        if name not in frozen
    }


def _frozen_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the parameters of the frozen backbone, under their names in the base."""
    return {name.replace(_BASE_LAYER, "."): parameter for name, parameter in _frozen_parameters(model)}


def _frozen_parameters(model: PreTrainedModel) -> list[tuple[str, Tensor]]:
    backbone = backbone_parameter_names(model)
    return [(name, value) for name, value in model.named_parameters() if name in backbone and not value.requires_grad]


def digest_of(weights: Mapping[str, Tensor]) -> str:
    """Return 16 hex digits that tell weights from those that any training has changed.

    They depend on names, shapes and the first values of each tensor, which are read quickly from any device.
    """
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        first = value.detach().flatten()[:_VALUES_PER_TENSOR].to("cpu", torch.float32)
        digest.update(f"{name} {tuple(value.shape)}".encode())
        digest.update(first.numpy().tobytes())
    return digest.hexdigest()[:16]


def read_weights(folder: str) -> tuple[dict[str, Tensor], str | None]:
    """Read the weights in a folder with adapters.

    Returns:
        The tensors by their names in the base, and the digest of the weights that were frozen, as `digest_of` makes
        it; None if the folder does not state it.

    Raises:
        UserError: The file is damaged.
    """
    path = Path(folder, ADAPTER_WEIGHTS)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a mapping
    except (SafetensorError, OSError) as error:
        raise UserError(f"--adapter {folder}: cannot read {ADAPTER_WEIGHTS}: {first_line(error)}") from None
    named = {name.removeprefix(_PREFIX).replace(_BASE_LAYER, "."): value for name, value in tensors.items()}
    return named, metadata.get(_DIGEST_KEY)

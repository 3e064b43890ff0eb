"""Adapters in a folder of peft's own format, together with all other weights that the training has changed."""

from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from raydet.models.adapters.lora import ADAPTER_NAME
from raydet.models.backbone import backbone_parameter_names

_WEIGHTS_FILE = "adapter_model.safetensors"
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
    weights = Path(folder, _WEIGHTS_FILE)
    save_file(_changed_weights(model), weights, metadata={"format": "pt"})
    # safetensors makes files private; the others follow the umask.
    weights.chmod(Path(folder, "adapter_config.json").stat().st_mode & 0o777)


def _changed_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return copies of all tensors but those of the frozen backbone, under peft's names."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    frozen = backbone_parameter_names(model) - trained
    # A tensor with two names is written twice, because `untied` separates them.
    return {
        _PREFIX + name.replace(f".{ADAPTER_NAME}.", "."): value.detach().cpu().contiguous().clone()
        for name, value in model.state_dict().items()
        if name not in frozen
    }

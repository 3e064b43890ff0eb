"""Loading of a zero-shot model and its processor."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor, PreTrainedModel

from raydet.common.errors import UserError
from raydet.common.hub_client import offline_if_local
from raydet.models.checkpoints import check_local_config
from raydet.models.detector import quiet
from raydet.tables import storage


def load_model(name: str) -> tuple[PreTrainedModel, Any]:
    """Load a zero-shot model in fp32 and its processor, by folder, URI or name on the Hub.

    Raises:
        UserError: The model cannot be read or lacks weights.
    """
    if not storage.exists(name):
        return _load_local(name, where=name)
    if storage.is_local(name):
        return _load_local(storage.resolve(name)[1], where=name)
    with tempfile.TemporaryDirectory() as folder:
        storage.fetch_folder(name, folder)
        return _load_local(folder, where=name)


def _load_local(source: str, *, where: str) -> tuple[PreTrainedModel, Any]:
    """Load a model and its processor from a local folder or from the Hub."""
    try:
        with quiet(), offline_if_local(source):
            if Path(source).exists():
                check_local_config(source)
            model, report = AutoModelForZeroShotObjectDetection.from_pretrained(
                source,
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # Reported below, in one line.
                output_loading_info=True,
            )
            processor = AutoProcessor.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"cannot read the zero-shot model {where}: {lines[0]}") from error
    unfit = {str(key if isinstance(key, str) else key[0]) for key in report["mismatched_keys"]}
    missing = sorted((unfit | set(report["missing_keys"])) & {name for name, _ in model.named_parameters()})
    if missing:
        raise UserError(
            f"the zero-shot model {where} is incomplete: {len(missing)} weights are missing or do not fit its "
            f"config.json, such as {missing[0]}; use a trained model"
        )
    return model, processor

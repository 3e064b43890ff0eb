"""The model of a crops run, loaded for its task."""

import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForDepthEstimation,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoModelForVisualQuestionAnswering,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
)

from raydet.common.errors import UserError, first_line
from raydet.common.hub_client import offline_if_local
from raydet.config import CropsConfig
from raydet.models.checkpoints import check_local_config
from raydet.models.detector import quiet
from raydet.second_looks.models.describing import Captioner, ChatAnswerer, QuestionClassifier
from raydet.second_looks.models.looker import Looker
from raydet.second_looks.models.seeing import Classifier, DepthMeter, Embedder, ZeroShotClassifier
from raydet.tables import storage

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_AUTO_CLASSES: Mapping[str, tuple[Any, Any]] = {
    "image-classification": (AutoModelForImageClassification, AutoImageProcessor),
    "zero-shot-image-classification": (AutoModelForZeroShotImageClassification, AutoProcessor),
    "image-feature-extraction": (AutoModel, AutoImageProcessor),
    "depth-estimation": (AutoModelForDepthEstimation, AutoImageProcessor),
}


def load_looker(config: CropsConfig, *, device: str, num_threads: int) -> Looker:
    """Load the model of a run.

    Raises:
        UserError: The model does not exist, cannot be read, or does not fit the task.
    """
    torch.set_num_threads(num_threads)
    with ExitStack() as stack:
        source = config.model
        if storage.exists(source):
            if storage.is_local(source):
                source = storage.resolve(source)[1]
            else:
                folder = stack.enter_context(tempfile.TemporaryDirectory())
                storage.fetch_folder(source, folder)
                source = folder
            check_local_config(source)
        try:
            with quiet(), offline_if_local(source):
                return _load(config, source, device)
        except (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError) as error:
            # Some processors import packages of their own, such as num2words, and name them.
            raise UserError(f"cannot read {config.model} as a model for {config.task}: {first_line(error)}") from error


def _load(config: CropsConfig, source: str, device: str) -> Looker:
    make: Callable[..., Looker]
    if config.task == "image-text-to-text":
        architectures = AutoConfig.from_pretrained(source, trust_remote_code=False).architectures or [""]
        answers_questions = "QuestionAnswering" in architectures[0]
        kind = AutoModelForVisualQuestionAnswering if answers_questions else AutoModelForImageTextToText
        processor = AutoProcessor.from_pretrained(source, trust_remote_code=False)
        if getattr(processor, "chat_template", None):
            make = ChatAnswerer
        elif architectures[0].startswith("Vilt"):
            make = QuestionClassifier
        else:
            make = Captioner
    else:
        kind, processor_kind = _AUTO_CLASSES[config.task]
        processor = processor_kind.from_pretrained(source, trust_remote_code=False)
        makers: dict[str, Callable[..., Looker]] = {
            "image-classification": Classifier,
            "zero-shot-image-classification": ZeroShotClassifier,
            "image-feature-extraction": Embedder,
            "depth-estimation": DepthMeter,
        }
        make = makers[config.task]
    loaded: Any = kind.from_pretrained(
        source,
        dtype=_DTYPES[config.precision],
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    model, report = loaded
    missing = sorted(set(report["missing_keys"]) & {name for name, _ in model.named_parameters()})
    if config.task == "image-feature-extraction" and missing and all("pooler" in name for name in missing):
        model.pooler, missing = None, []  # checkpoints of classifiers have none
    if missing:
        raise UserError(
            f"{config.model} has no weights for {config.task}: {len(missing)} are missing, such as {missing[0]}; use a "
            "model that was trained for this task"
        )
    return make(model.to(device).eval(), processor, config)

"""Makes detectors: a small one from scratch, or one from a model folder or the Hugging Face Hub.

One contract over all model families: `Detector`. Every failure to get a model is one clear line.
"""

import copy
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoModelForObjectDetection, PreTrainedConfig, PreTrainedModel

from raydet.checkpoints import categories_in
from raydet.detector import Detections, Detector, quiet
from raydet.errors import UserError
from raydet.families import Family, family_of, resized_processor
from raydet.schema import Category
from raydet.small_models import DEFAULT_IMAGE_SIZE, SMALL_MODELS

__all__ = ["SMALL_MODELS", "Detections", "Detector", "backbone_parameter_names", "build_detector", "load_detector"]

logger = logging.getLogger("raydet")


def build_detector(
    name: str,
    categories: Sequence[Category],
    *,
    image_size: int | None,
    seed: int,
    freeze_batch_norm: bool = False,
) -> Detector:
    """Makes a detector ready for training.

    Args:
        name: A named small model (a key of `SMALL_MODELS`), built from scratch; a local model folder; or a Hub name.
        categories: The classes to learn, in the order of their indices. Where a checkpoint's own class names differ,
            its class head starts anew.
        image_size: In pixels, the side for families with a fixed size; for those that keep the aspect the longest
            side. By default the checkpoint's own, and 256 for models from scratch.
        seed: Of every weight that is not loaded.
        freeze_batch_norm: Batch norms keep their statistics and weights, also in training.

    Raises:
        UserError: No such model, one that cannot be read or trained, or an unfit image size.
    """
    name = os.path.expanduser(name)
    if not categories:
        raise UserError(f"cannot train {name} without categories: the images table lists none")
    with quiet(), torch.random.fork_rng():
        torch.manual_seed(seed)
        if name in SMALL_MODELS:
            config = SMALL_MODELS[name]()
            family = family_of(config.model_type, where=name)
            _prepare_for_training(config, categories, family)
            model = _new_model(config)
            _open_batch_norms(model)
            processor = resized_processor(_default_processor(family), family, image_size or DEFAULT_IMAGE_SIZE)
        else:
            config, family = _read_config(name)
            processor = _read_processor(name, family)
            own_names = [category.name for category in categories_in(config.to_dict())]
            own_number = config.num_labels
            _prepare_for_training(config, categories, family)
            model = _read_model(name, config)
            names = [category.name for category in categories]
            # Another number of classes has changed the shape of the head, so that it starts anew as it is.
            if own_names != names and own_number == len(names):
                _reset_class_head(model)
            if image_size is not None:
                processor = resized_processor(processor, family, image_size)
    detector = Detector(model, processor, categories, where=name)
    _check_image_size(detector, name)
    for parameter_name, parameter in model.named_parameters():
        # transformers freezes a DETR's ResNet, all of it or none, depending on where the ResNet is from.
        if parameter_name.startswith(family.backbone_prefix):
            parameter.requires_grad_(True)
    if freeze_batch_norm:
        _freeze_batch_norms(model)
    _mend_batch_norm_gradients(model)
    return detector


def load_detector(name: str) -> Detector:
    """Opens a trained detector.

    Args:
        name: A folder that `Detector.save` or transformers wrote, or a Hub name.

    Raises:
        UserError: No such model, not a detector, or one that does not name its classes.
    """
    name = os.path.expanduser(name)
    with quiet():
        config, family = _read_config(name)
        categories = categories_in(config.to_dict())
        if not categories:
            raise UserError(f"the config.json of {name} does not name the classes; give it an id2label")
        model = _read_model(name, config)
        processor = _read_processor(name, family)
    detector = Detector(model, processor, categories, where=name)
    model.eval()
    return detector


def backbone_parameter_names(model: nn.Module) -> set[str]:
    """Names, as in `named_parameters`, of what belongs to the pretrained backbone and learns at a lower rate.

    In YOLOS this is the vision transformer without its detection tokens.
    """
    config: Any = model.config
    prefix = family_of(config.model_type, where="this model").backbone_prefix
    return {name for name, _ in model.named_parameters() if name.startswith(prefix) and "detection_tokens" not in name}


def _prepare_for_training(config: PreTrainedConfig, categories: Sequence[Category], family: Family) -> None:
    config.num_labels = len(categories)
    config.id2label = {index: category.name for index, category in enumerate(categories)}
    config.label2id = {category.name: index for index, category in enumerate(categories)}
    if family.auxiliary_loss:
        config.auxiliary_loss = True
    # Position codes and anchors laid out for one image size would be wrong at any other.
    for attribute in ("eval_size", "anchor_image_size"):
        if hasattr(config, attribute):
            setattr(config, attribute, None)


def _read_config(name: str) -> tuple[PreTrainedConfig, Family]:
    folder = Path(name)
    if folder.exists():
        if not (folder / "config.json").is_file():
            raise UserError(f"{name} holds no model: there is no config.json in it; give the folder of a checkpoint")
    elif not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(
            f"no model {name}: it is not a folder, not a Hub name (owner/name), "
            f"and not one of the small models {', '.join(SMALL_MODELS)}"
        )
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise _cannot_read(name, error) from error
    return config, family_of(config.model_type, where=name)


def _read_model(name: str, config: PreTrainedConfig) -> PreTrainedModel:
    try:
        model, report = AutoModelForObjectDetection.from_pretrained(
            name,
            config=config,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except ImportError as error:
        raise UserError(f"{name} has a backbone of the timm package: pip install 'raydet[timm]'") from error
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise _cannot_read(name, error) from error
    fresh = sorted({str(key if isinstance(key, str) else key[0]) for key in report["mismatched_keys"]})
    missing = sorted(report["missing_keys"])
    if fresh:
        logger.info("class head of %s starts anew: %s", name, ", ".join(fresh))
    if missing:
        logger.warning("%s lacks these weights, they start anew: %s", name, ", ".join(missing))
    result: PreTrainedModel = model
    return result


def _read_processor(name: str, family: Family) -> Any:
    try:
        return AutoImageProcessor.from_pretrained(name, backend="torchvision", trust_remote_code=False)
    except (OSError, ValueError):
        logger.warning("%s has no image processor of its own, taking the default %s", name, family.processor)
        return _default_processor(family)


def _default_processor(family: Family) -> Any:
    return getattr(transformers, family.processor)()


def _cannot_read(name: str, error: Exception) -> UserError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if Path(name).exists():
        return UserError(f"cannot read the model in {name}: {reason}")
    return UserError(
        f"{name} is no folder here and cannot be had from the Hugging Face Hub: {reason} Check the name and the "
        "connection, or give a local model folder"
    )


def _reset_class_head(model: PreTrainedModel) -> None:
    """Gives new random values to all that depends on the classes, also where their number happens to be the same."""
    config = model.config
    wider = copy.deepcopy(config)
    wider.num_labels = len(config.id2label or {}) + 1
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in _new_model(wider).state_dict().items()}
    fresh = _new_model(config).state_dict()
    own = model.state_dict()
    names = sorted(name for name, value in own.items() if value.shape != shapes[name])
    for name in names:
        own[name].copy_(fresh[name])
    logger.info("class head starts anew: %s", ", ".join(names))


def _new_model(config: PreTrainedConfig) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForObjectDetection.from_config(config)
    return model


def _open_batch_norms(model: nn.Module) -> None:
    """Starts batch norms at a scale of one.

    transformers starts those of the RT-DETR family at about 0.01, made to be overwritten by a checkpoint; from there
    a model learns several times more slowly.
    """
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)


def _mend_batch_norm_gradients(model: nn.Module) -> None:
    """Keeps a batch of one image from getting a wrong gradient on the CPU.

    torch 2.15's batch norm takes a gradient of shape [1, C, H, W] that lies in memory as [1, H, W, C], which is what
    flattening to [1, H·W, C] behind it sends back, for one that lies as [1, C, H, W].
    """
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(_ask_for_contiguous_gradient)


def _ask_for_contiguous_gradient(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    if output.shape[0] == 1 and output.requires_grad:
        output.register_hook(Tensor.contiguous)


def _check_image_size(detector: Detector, name: str) -> None:
    """Refuses sizes at which the model would fail in the middle of a run."""
    size_hw = detector.resize_rule.size_hw
    multiple = detector.family.side_multiple
    if size_hw is None or multiple == 1:
        return
    height, width = size_hw
    if height % multiple or width % multiple:
        raise UserError(f"image_size must be a multiple of {multiple} for {name}, got {height}")
    strides: Sequence[int] = detector.model.config.feat_strides
    num_places = sum((height // stride) * (width // stride) for stride in strides)
    if num_places < detector.num_queries:
        raise UserError(
            f"image_size {height} is too small for {name}: it has {detector.num_queries} queries but only {num_places} "
            f"places in the picture to start from; raise image_size"
        )


class _FrozenBatchNorm2d(nn.BatchNorm2d):
    """A batch norm that stays in evaluation mode; its weights keep their names, so that folders stay the same."""

    def train(self, mode: bool = True) -> "_FrozenBatchNorm2d":
        return super().train(False)


def _freeze_batch_norms(model: nn.Module) -> None:
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = _FrozenBatchNorm2d
            module.train(False)
            for parameter in module.parameters():
                parameter.requires_grad_(False)

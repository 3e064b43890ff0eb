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

from raydet.common.errors import UserError
from raydet.config import Backbone, BatchNorm
from raydet.models.batch_norm import FrozenBatchNorm2d, freeze_batch_norms, synchronise_batch_norms
from raydet.models.checkpoints import categories_in
from raydet.models.detector import Detections, Detector, quiet
from raydet.models.families import Family, family_of, resize_rule_of, resized_processor, side_multiple_of
from raydet.models.geometry import ResizeRule
from raydet.models.loss import keep_loss_local
from raydet.models.small import DEFAULT_IMAGE_SIZE, SMALL_MODELS
from raydet.tables.schema import Category

__all__ = [
    "SMALL_MODELS",
    "Detections",
    "Detector",
    "backbone_parameter_names",
    "build_detector",
    "freeze_backbone",
    "load_detector",
    "synchronise_batch_norms",
]

_STEM = re.compile(
    r"(^|\.)(embedder|embeddings|mid_position_embeddings|stem(_\d+)?|stages[._]0|patch_embed|pos_embed|cls_token"
    r"|reg_token|(model|_backbone)\.(conv1|bn1|layer1))(\.|$)"
)
"""In the names of a backbone's parameters: what comes first in it, by transformers' and by timm's names."""

logger = logging.getLogger("raydet")


def build_detector(
    name: str,
    categories: Sequence[Category],
    *,
    image_size: int | None,
    seed: int,
    batch_norm: BatchNorm = "as_is",
    freeze_backbone: Backbone = "none",
    gradient_checkpointing: bool = False,
) -> Detector:
    """Makes a detector ready for training.

    Args:
        name: A named small model (a key of `SMALL_MODELS`), built from scratch; a local model folder; or a Hub name.
        categories: The classes to learn, in the order of their indices. Where a checkpoint's own class names differ,
            its class head starts anew.
        image_size: In pixels, the side for families with a fixed size; for those that keep the aspect the longest
            side. By default the checkpoint's own, and 256 for models from scratch.
        seed: Of every weight that is not loaded.
        batch_norm: as_is: as the model has them; freeze: they keep their statistics and weights, also in training;
            sync: as_is, for the training loop to call `synchronise_batch_norms` on once the model is on its device.
        freeze_backbone: What of the backbone does not learn, see the function of this name.
        gradient_checkpointing: Activations are computed again in the backward pass instead of being kept.

    Raises:
        UserError: No such model, one that cannot be read or trained, an unfit image size, or an option that the model
            has no use for.
    """
    name = os.path.expanduser(name)
    if not categories:
        raise UserError(f"cannot train {name} without categories: the images table lists none")
    with quiet(), torch.random.fork_rng():
        torch.manual_seed(seed)
        fresh: set[str] = set()
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
            model, fresh = _read_model(name, config)
            names = [category.name for category in categories]
            # Another number of classes has changed the shape of the head, so that it starts anew as it is.
            if own_names != names and own_number == len(names):
                fresh |= _reset_class_head(model)
            if image_size is not None:
                processor = resized_processor(processor, family, image_size)
    detector = Detector(model, processor, categories, where=name, reinitialised=_with_ties(model, fresh))
    if detector.reinitialised:
        logger.info("starts anew in %s: %s", name, ", ".join(detector.reinitialised))
    _check_image_size(detector, name)
    if batch_norm == "freeze":
        freeze_batch_norms(model)
    _freeze(model, freeze_backbone, where=name)
    if gradient_checkpointing:
        _checkpoint_gradients(model, where=name)
    _mend_batch_norm_gradients(model)
    return detector


def resize_rule_for(name: str, image_size: int | None) -> ResizeRule:
    """How `build_detector` would have images resized, without making the model.

    Args:
        name: As for `build_detector`.
        image_size: Alike.

    Raises:
        UserError: No such model, or one that cannot be read.
    """
    name = os.path.expanduser(name)
    with quiet():
        if name in SMALL_MODELS:
            family = family_of(SMALL_MODELS[name]().model_type, where=name)
            processor = _default_processor(family)
            image_size = image_size or DEFAULT_IMAGE_SIZE
        else:
            _, family = _read_config(name)
            processor = _read_processor(name, family)
        if image_size is not None:
            processor = resized_processor(processor, family, image_size)
    return resize_rule_of(processor, where=name)


def load_detector(name: str) -> Detector:
    """Opens a trained detector.

    Args:
        name: A folder that `Detector.save` or transformers wrote, or a Hub name.

    Raises:
        UserError: No such model, not a detector, one that does not name its classes, or one with weights missing.
    """
    name = os.path.expanduser(name)
    with quiet():
        config, family = _read_config(name)
        categories = categories_in(config.to_dict())
        if not categories:
            raise UserError(f"the config.json of {name} does not name the classes; give it an id2label")
        model, fresh = _read_model(name, config)
        processor = _read_processor(name, family)
    # The embedding of noisy boxes serves training alone, and may have been left out.
    missing = sorted(fresh & {name for name, _ in model.named_parameters() if "denoising" not in name})
    if missing:
        raise UserError(
            f"the model in {name} is not whole: {len(missing)} weights are missing or do not fit its config.json, such "
            f"as {missing[0]}; give a trained checkpoint"
        )
    model.eval()
    return Detector(model, processor, categories, where=name)


def backbone_parameter_names(model: nn.Module) -> set[str]:
    """Names, as in `named_parameters`, of what belongs to the pretrained backbone and learns at a lower rate.

    In YOLOS this is the vision transformer without its detection tokens.
    """
    config: Any = model.config
    prefixes = family_of(config.model_type, where="this model").backbone_prefixes
    names = {name for name, _ in model.named_parameters() if name.startswith(prefixes)}
    return {name for name in names if "detection_tokens" not in name}


def freeze_backbone(model: nn.Module, part: Backbone) -> None:
    """Freezes a part of the backbone and lets the rest of it learn; may be called again, at any time.

    It sets `requires_grad` of parameters. The statistics of batch norms are the business of `batch_norm`, and batch
    norms that it has frozen stay so. transformers' own default, all of the backbone or none of it depending on where
    it is from, is overruled. A DistributedDataParallel around the model, and an optimizer that was given only what
    learned then, must be made again.

    Args:
        model: Of any family.
        part: none: all of the backbone learns. stem: what comes first does not: in a vision transformer the patches'
            and positions' embeddings, in a ResNet, HGNet or another network of stages the stem and the first stage,
            as DETR's authors freeze `conv1`, `bn1` and `layer1`. all: nothing of it learns.

    Raises:
        UserError: This backbone has no part known as its stem.
    """
    _freeze(model, part, where="this model")


def _freeze(model: nn.Module, part: Backbone, *, where: str) -> None:
    names = backbone_parameter_names(model)
    stem = {name for name in names if _STEM.search(name)}
    if part == "stem" and not stem:
        raise UserError(f"--freeze-backbone stem: cannot tell the stem of the backbone of {where}; use none or all")
    frozen = {"none": set(), "stem": stem, "all": names}[part]
    norms = {
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        if isinstance(module, FrozenBatchNorm2d)
        for name, _ in module.named_parameters()
    }
    for name, parameter in model.named_parameters():
        if name in names:
            parameter.requires_grad_(name not in frozen | norms)


def _checkpoint_gradients(model: PreTrainedModel, *, where: str) -> None:
    if not model.supports_gradient_checkpointing:
        raise UserError(
            f"--gradient-checkpointing: {where} is a {model.config.model_type} model, for which transformers has none; "
            "use --gradient-accumulation-steps to save memory"
        )
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})


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


def _read_model(name: str, config: PreTrainedConfig) -> tuple[PreTrainedModel, set[str]]:
    """The model, and the names of weights that it did not find in the checkpoint or not in the right shape."""
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
    keep_loss_local(model)
    fresh = {str(key if isinstance(key, str) else key[0]) for key in report["mismatched_keys"]}
    return model, fresh | set(report["missing_keys"])


def _read_processor(name: str, family: Family) -> Any:
    try:
        processor = AutoImageProcessor.from_pretrained(name, backend="torchvision", trust_remote_code=False)
    except (OSError, ValueError):
        logger.warning("%s has no image processor of its own, taking the default %s", name, family.processor)
        return _default_processor(family)
    if type(processor).__name__ != "RfDetrImageProcessor":
        return processor
    # It resizes in floating point and without antialiasing, which pictures of whole numbers between 0 and 255 cannot
    # follow. RT-DETR's processor reads the outputs alike, and is what the folder says from now on.
    content = processor.to_dict()
    kept = ("size", "resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std", "do_pad")
    return transformers.RTDetrImageProcessor(**{key: content[key] for key in (*kept, "pad_size") if key in content})


def _default_processor(family: Family) -> Any:
    processor = getattr(transformers, family.processor)()
    if family.model_type == "rf_detr":
        # Unlike RT-DETR's backbones, a DINOv2 wants its colours normalised.
        processor = type(processor).from_dict({**processor.to_dict(), "do_normalize": True})
    return processor


def _cannot_read(name: str, error: Exception) -> UserError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if Path(name).exists():
        return UserError(f"cannot read the model in {name}: {reason}")
    return UserError(
        f"{name} is no folder here and cannot be had from the Hugging Face Hub: {reason} Check the name and the "
        "connection, or give a local model folder"
    )


def _reset_class_head(model: PreTrainedModel) -> set[str]:
    """Gives new random values to all that depends on the classes, also where their number happens to be the same.

    Returns:
        The names of these tensors.
    """
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
    return set(names)


def _with_ties(model: nn.Module, names: set[str]) -> list[str]:
    """These tensors, and the other names that they have where they stand in several places, sorted."""
    state = model.state_dict()
    places = {state[name].data_ptr() for name in names if name in state}
    return sorted(name for name, value in state.items() if value.data_ptr() in places)


def _new_model(config: PreTrainedConfig) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForObjectDetection.from_config(config)
    keep_loss_local(model)
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
    config, rule = detector.model.config, detector.resize_rule
    multiple = side_multiple_of(config, detector.family)
    if multiple == 1:
        return
    size_hw = rule.size_hw or rule.pad_to_hw
    if size_hw is None:
        raise UserError(
            f"the image processor of {name} lets every image keep its aspect, but the model needs sides that are a "
            f"multiple of {multiple}; give --image-size"
        )
    height, width = size_hw
    if height % multiple or width % multiple:
        raise UserError(f"--image-size must be a multiple of {multiple} for {name}, got {height}")
    strides = _strides(config)
    num_places = sum(int(height // stride) * int(width // stride) for stride in strides)
    if num_places < detector.num_queries:
        raise UserError(
            f"--image-size {height} is too small for {name}: it has {detector.num_queries} queries but "
            f"only {num_places} places in the picture to start from; raise --image-size"
        )


def _strides(config: Any) -> Sequence[float]:
    """Pixels from one place to the next, on each level of the features that queries start from."""
    if config.model_type == "lw_detr":
        return [config.backbone_config.patch_size / scale for scale in config.projector_scale_factors]
    if config.model_type == "rf_detr":
        return [config.backbone_config.patch_size]
    strides: Sequence[float] = config.feat_strides
    return strides

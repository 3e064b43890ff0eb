"""Build a detector for training or load a trained one, from a small model's name, a model folder or the Hub.

All model families end up in one class, `Detector`. Every failure to get a model is one clear line.
"""

import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import OfflineModeIsEnabled
from transformers import AutoConfig, AutoImageProcessor, AutoModelForObjectDetection, PreTrainedConfig, PreTrainedModel

from raydet.common.class_names import check_mapping
from raydet.common.errors import UserError, first_line
from raydet.common.hub_client import offline_if_local
from raydet.config import Backbone, BatchNorm
from raydet.models import backbone
from raydet.models.adapters.lora import add_adapters
from raydet.models.batch_norm import (
    freeze_batch_norms,
    keep_batch_norm_gradients_contiguous,
    reset_batch_norm_scales,
)
from raydet.models.checkpoints import (
    PROCESSOR_FILES,
    categories_in,
    check_local_config,
    holds_graph,
    hub_config_path,
    only_graph,
)
from raydet.models.class_heads import change_classes, set_labels, start_at_prior
from raydet.models.detector import Detector, quiet
from raydet.models.families import FAMILIES, Family, family_of
from raydet.models.geometry import ResizeRule
from raydet.models.losses.criterion import install_criterion
from raydet.models.processors import (
    check_image_size,
    check_normalisation,
    check_num_queries,
    default_processor,
    resize_rule_of,
    resized_processor,
    step_resize_rules,
    supported_processor,
)
from raydet.models.small import DEFAULT_IMAGE_SIZE, SMALL_MODELS
from raydet.tables.schema import Category

logger = logging.getLogger("raydet")


def build_detector(
    name: str,
    categories: Sequence[Category],
    *,
    image_size: int | None,
    seed: int,
    class_mapping: Mapping[str, str] | None = None,
    batch_norm: BatchNorm = "as_is",
    freeze_backbone: Backbone = "none",
    gradient_checkpointing: bool = False,
    lora: Mapping[str, float] | None = None,
) -> Detector:
    """Build a detector for training.

    Args:
        name: A small model (a key of `SMALL_MODELS`), which is built from scratch; a local model folder; or a Hub name.
        categories: The classes to learn, in the order of their indices. A class that the checkpoint has keeps its
            weights, see `raydet.models.class_heads.change_classes`.
        class_mapping: Class of the checkpoint → class to learn, for classes that have been renamed.
        image_size: In pixels: the side for families with a fixed input size, the longest side for families that keep
            the aspect ratio. Defaults to the checkpoint's own size, or 256 for small models.
        seed: Seed of every weight that is not loaded.
        batch_norm: `as_is` leaves batch norms as the model has them. `freeze` keeps their statistics and weights
            fixed, in training too. `sync` does the same as `as_is` here; the training loop calls
            `synchronise_batch_norms` once the model is on its device.
        freeze_backbone: The part of the backbone that does not learn, see `raydet.models.backbone.freeze_backbone`.
        gradient_checkpointing: Recompute activations in the backward pass instead of keeping them.
        lora: Put adapters into the vision transformer, see `raydet.models.adapters.lora.add_adapters`.

    Raises:
        UserError: The model does not exist, cannot be read or trained, does not work at this image size, or does not
            support one of the options.
    """
    name = os.path.expanduser(name)
    if not categories:
        raise UserError(f"cannot train {name} without classes: the images table names none")
    with quiet(), offline_if_local(name), torch.random.fork_rng():
        torch.manual_seed(seed)
        names: list[str] = [category.name for category in categories]
        notes: list[str] = []
        if name in SMALL_MODELS:
            check_mapping(class_mapping or {}, names, (), where=name)
            config = SMALL_MODELS[name].make_config()
            family = family_of(config.model_type, where=name)
            set_labels(config, names)
            _prepare_for_training(config, family)
            model = _new_model(config)
            reset_batch_norm_scales(model)
            start_at_prior(model, family, _new_model)
            processor = resized_processor(default_processor(family), family, image_size or DEFAULT_IMAGE_SIZE)
        else:
            config, family = read_config(name)
            processor = read_processor(name, family)
            own_names = _class_names(config)
            check_mapping(class_mapping or {}, names, own_names, where=name)
            _prepare_for_training(config, family)
            model, fresh = read_model(name, config)
            notes = [f"weights that {name} lacks, which start anew: {', '.join(sorted(fresh))}"] if fresh else []
            if lora and (random := fresh & backbone.backbone_parameter_names(model)):
                raise UserError(
                    f"--lora needs a complete backbone to adapt, but {name} lacks {', '.join(sorted(random))}"
                )
            if own_names != names:
                rows = change_classes(
                    model, family, own_names, names, mapping=class_mapping, new_model=_new_model, missing=fresh
                )
                notes += rows.lines()
            if image_size is not None:
                processor = resized_processor(processor, family, image_size)
    detector = Detector(model, processor, categories, where=name, notes=notes)
    for note in notes:
        logger.info(note)
    check_image_size(model.config, family, detector.resize_rule, num_queries=detector.num_queries, where=name)
    if batch_norm == "freeze":
        freeze_batch_norms(model)
    backbone.freeze_backbone(model, freeze_backbone, where=name)
    if lora:
        detector.notes = (*detector.notes, add_adapters(model, lora, seed=seed, where=name))
    if gradient_checkpointing:
        _checkpoint_gradients(model, where=name)
    keep_batch_norm_gradients_contiguous(model)
    return detector


def resize_rules_for(
    name: str, image_size: int | None, multi_scale: Sequence[int] = ()
) -> tuple[ResizeRule, tuple[ResizeRule, ...]]:
    """Return the resize rule of the detector that `build_detector` would make, and those of the sizes of its steps.

    Raises:
        UserError: The model does not exist or cannot be read.
    """
    name = os.path.expanduser(name)
    with quiet(), offline_if_local(name):
        if name in SMALL_MODELS:
            family = FAMILIES[SMALL_MODELS[name].model_type]
            processor = default_processor(family)
            image_size = image_size or DEFAULT_IMAGE_SIZE
        else:
            _, family = read_config(name)
            processor = read_processor(name, family)
        if image_size is not None:
            processor = resized_processor(processor, family, image_size)
    rule = resize_rule_of(processor, where=name)
    if rule.size_hw is not None and any(side % family.side_multiple for side in rule.size_hw):
        height, width = rule.size_hw
        raise UserError(
            f"the image processor of {name} makes images of {height} × {width} pixels, but its model needs multiples "
            f"of {family.side_multiple}; correct size in its preprocessor_config.json"
        )
    return rule, step_resize_rules(processor, family, multi_scale, where=name)


def load_detector(name: str) -> Detector:
    """Load a trained detector, in evaluation mode.

    Args:
        name: A folder that `Detector.save` or transformers wrote, or a Hub name.

    Raises:
        UserError: The model does not exist, is not a detector, does not name its classes, or lacks weights.
    """
    name = os.path.expanduser(name)
    if holds_graph(name):
        raise only_graph(name)
    with quiet(), offline_if_local(name):
        config, family = read_config(name)
        categories = _categories(config, name)
        model, fresh = read_model(name, config)
        processor = read_processor(name, family)
    if missing := missing_weights(model, fresh):
        raise UserError(
            f"the model in {name} is incomplete: {len(missing)} weights are missing or do not fit its config.json, "
            f"such as {missing[0]}; use a trained checkpoint"
        )
    return _evaluated(model, processor, categories, name)


def load_without_weights(name: str) -> Detector:
    """Build the detector of a folder that holds a graph instead of weights; its parameters are on the meta device.

    Raises:
        UserError: The folder describes no detector, or does not name its classes.
    """
    with quiet(), offline_if_local(name):
        config, family = read_config(name)
        categories = _categories(config, name)
        try:
            with torch.device("meta"):
                model = _new_model(config)
        except Exception as error:  # dozens of types are possible
            raise _cannot_read(name, error) from error
        processor = read_processor(name, family)
    return _evaluated(model, processor, categories, name)


def _categories(config: PreTrainedConfig, name: str) -> tuple[Category, ...]:
    categories = categories_in(config.to_dict())
    if not categories:
        raise UserError(f"the config.json of {name} does not name the classes; add id2label")
    return categories


def _evaluated(model: PreTrainedModel, processor: Any, categories: Sequence[Category], name: str) -> Detector:
    """Make a detector in evaluation mode."""
    model.eval()
    detector = Detector(model, processor, categories, where=name)
    check_num_queries(model.config, detector.family, detector.resize_rule, num_queries=detector.num_queries, where=name)
    return detector


def missing_weights(model: PreTrainedModel, fresh: set[str]) -> list[str]:
    """Return those of some names of weights, sorted, without which a model cannot detect anything."""
    # Only training uses the embedding of noisy boxes; a checkpoint may omit it.
    return sorted(fresh & {name for name, _ in model.named_parameters() if "denoising" not in name})


def _checkpoint_gradients(model: PreTrainedModel, *, where: str) -> None:
    if not model.supports_gradient_checkpointing:
        raise UserError(
            f"--gradient-checkpointing: {where} is a {model.config.model_type} model, for which transformers does not "
            "support it; use --gradient-accumulation-steps to save memory"
        )
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})


def _class_names(config: PreTrainedConfig) -> list[str]:
    """Return the class names of a checkpoint by index, placeholders of transformers included."""
    named = [category.name for category in categories_in(config.to_dict())]
    return named or [f"LABEL_{index}" for index in range(config.num_labels or 0)]


def _prepare_for_training(config: PreTrainedConfig, family: Family) -> None:
    if family.auxiliary_loss:
        config.auxiliary_loss = True
    # Position codes and anchors computed for one image size would be wrong at any other.
    for attribute in ("eval_size", "anchor_image_size"):
        if hasattr(config, attribute):
            setattr(config, attribute, None)


def read_config(name: str) -> tuple[PreTrainedConfig, Family]:
    """Read the config of a model folder or of a name on the Hub.

    Raises:
        UserError: There is no model of a supported family.
    """
    folder = Path(name)
    if folder.exists():
        if not (folder / "config.json").is_file():
            raise UserError(f"{name} holds no model (no config.json); use the folder of a checkpoint")
        check_local_config(name)
    elif not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(
            f"no such model: {name} is neither a folder nor a Hub name (owner/name) nor one of the small models "
            f"{', '.join(SMALL_MODELS)}"
        )
    else:
        hub_config_path(name)  # tells at once if the Hub cannot be reached
    return parse_config(name)


def parse_config(name: str) -> tuple[PreTrainedConfig, Family]:
    """Read the config of a place that has been checked, which may also be a folder with adapters.

    Raises:
        UserError: It cannot be read, or belongs to no supported family.
    """
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # dozens of types are possible
        raise _cannot_read(name, error) from error
    return config, family_of(config.model_type, where=name)


def read_model(name: str, config: PreTrainedConfig) -> tuple[PreTrainedModel, set[str]]:
    """Load a model; also return the names of weights that the checkpoint lacks or has in a different shape.

    Raises:
        UserError: The model cannot be read.
    """
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
        raise UserError(f"{name} has a backbone from the timm package; run: pip install 'raydet[timm]'") from error
    except MemoryError:
        raise
    except Exception as error:  # dozens of types are possible
        raise _cannot_read(name, error) from error
    install_criterion(model)
    fresh = {str(key if isinstance(key, str) else key[0]) for key in report["mismatched_keys"]}
    return model, fresh | set(report["missing_keys"])


def read_processor(name: str, family: Family) -> Any:
    """Read the image processor of a model, or make the default of its family.

    Raises:
        UserError: It cannot be read, or normalises in a way that raydet does not support.
    """
    try:
        processor = AutoImageProcessor.from_pretrained(name, backend="torchvision", trust_remote_code=False)
    except Exception as error:  # dozens of types are possible
        if any(Path(name, file).exists() for file in PROCESSOR_FILES):
            raise _cannot_read(name, error) from error
        if not isinstance(error, OSError | ValueError):
            raise
        logger.warning("%s has no image processor; using the default, %s", name, family.processor)
        return default_processor(family)
    check_normalisation(processor, where=name)
    return supported_processor(processor)


def _cannot_read(name: str, error: Exception) -> UserError:
    """Make the error for a model that transformers fails to load."""
    if isinstance(error, OfflineModeIsEnabled) and Path(name).exists():
        return UserError(
            f"the model in {name} is incomplete: its config.json refers to another model, which raydet does not fetch "
            "for a local folder"
        )
    reason = first_line(error)
    if Path(name).exists():
        return UserError(f"cannot read the model in {name}: {reason}")
    return UserError(
        f"{name} is not a local folder and cannot be loaded from the Hugging Face Hub ({reason}); check the name and "
        "the connection, or use a local model folder"
    )


def _new_model(config: PreTrainedConfig) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForObjectDetection.from_config(config)
    install_criterion(model)
    return model

"""Zero-shot detectors: models that find objects by their names in plain words.

This module checks a model's name and its labels without torch, so that the driver can refuse wrong ones immediately.
The worker that runs the model imports `raydet.engines.zero_shot_models`.
"""

from typing import TYPE_CHECKING

from raydet.common.errors import UserError
from raydet.config import PredictConfig
from raydet.engines.zero_shot_models.prompts import Prompt, prompts_of
from raydet.models.checkpoints import read_checkpoint
from raydet.models.families import FAMILIES, ZERO_SHOT_FAMILIES

if TYPE_CHECKING:
    from raydet.engines.engine import Engine


def check_zero_shot(name: str) -> str:
    """Check the `config.json` of a model folder, or of a name on the Hub, and return the type of zero-shot detector.

    Raises:
        UserError: There is no model, or it is not a zero-shot detector.
    """
    model_type = read_checkpoint(name).model_type
    if model_type in FAMILIES:
        raise UserError(
            f"--model {name} is a {model_type} detector with its own classes; pass it as --checkpoint {name} and omit "
            "--labels"
        )
    if model_type not in ZERO_SHOT_FAMILIES:
        raise UserError(
            f"--model {name} is a {model_type} model, not a supported zero-shot detector; raydet supports "
            f"OWL-ViT, OWLv2 and Grounding DINO ({', '.join(ZERO_SHOT_FAMILIES)})"
        )
    return model_type


def check_prompts(config: PredictConfig) -> tuple[Prompt, ...]:
    """Return what a zero-shot model is to look for.

    Raises:
        UserError: There is no such model, or it cannot read these prompts.
    """
    assert config.model is not None, "the config asks for a model"
    model_type = check_zero_shot(config.model)
    if ZERO_SHOT_FAMILIES[model_type].reads_labels != "separately":
        for option, value in (("--examples", config.examples), ("--prompt-template", config.prompt_template)):
            if value:
                raise UserError(f"{option} needs OWL-ViT or OWLv2, but --model {config.model} is a {model_type} model")
    return prompts_of(config)


def load_zero_shot(config: PredictConfig, *, device: str, num_threads: int) -> "Engine":
    """Load the zero-shot detector of a config.

    Its categories are the labels in order; the id of each is its index.

    Raises:
        UserError: The model does not exist, cannot be read or is not a zero-shot detector, it cannot read a label, or
            the device does not support the precision.
    """
    assert config.model is not None, "the config asks for a model"
    prompts = check_prompts(config)
    if ZERO_SHOT_FAMILIES[check_zero_shot(config.model)].reads_labels == "separately":
        from raydet.engines.zero_shot_models.owl import OwlEngine

        return OwlEngine(config.model, prompts, config=config, device=device, num_threads=num_threads)
    from raydet.engines.zero_shot_models.grounding_dino import GroundingDinoEngine

    labels = [prompt.label for prompt in prompts]
    return GroundingDinoEngine(config.model, labels, config=config, device=device, num_threads=num_threads)

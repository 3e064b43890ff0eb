"""Zero-shot detectors: models that look for whatever words they are given.

Their names are checked here without torch, so that a driver can refuse a wrong one at once; what runs them,
`raydet.engines.zero_shot_models`, is imported by the worker that needs it.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from raydet.common.errors import UserError
from raydet.config import PredictConfig
from raydet.models.checkpoints import read_checkpoint
from raydet.models.families import FAMILIES

if TYPE_CHECKING:
    from raydet.engines.engine import Engine

OWL_TYPES = ("owlvit", "owlv2")
GROUNDING_TYPES = ("grounding-dino", "mm-grounding-dino")


def check_zero_shot(name: str) -> str:
    """Makes sure that a model is a zero-shot detector, by its `config.json` alone.

    Args:
        name: A model folder, or a name on the Hub.

    Returns:
        Its model type, as transformers calls it.

    Raises:
        UserError: There is no model, or it is of another kind.
    """
    model_type = read_checkpoint(name).model_type
    if model_type in FAMILIES:
        raise UserError(
            f"--model {name} is a {model_type} detector, which has classes of its own; give it as --checkpoint {name}, "
            "without --labels"
        )
    if model_type not in OWL_TYPES + GROUNDING_TYPES:
        raise UserError(
            f"--model {name} is a {model_type} model, no zero-shot detector that raydet knows; "
            f"it takes OWL-ViT, OWLv2 and Grounding DINO ({', '.join(OWL_TYPES + GROUNDING_TYPES)})"
        )
    return model_type


def check_labels(labels: Sequence[str]) -> tuple[str, ...]:
    """The labels without spaces around them.

    Raises:
        UserError: Two of them are the same to a model, which does not see upper case and double spaces.
    """
    seen: dict[str, str] = {}
    for label in labels:
        plain = " ".join(label.lower().split())
        if plain in seen:
            raise UserError(f"--labels names one twice: {seen[plain]!r} and {label.strip()!r} are one to the model")
        seen[plain] = label.strip()
    return tuple(seen.values())


def load_zero_shot(config: PredictConfig, *, device: str, num_threads: int) -> "Engine":
    """Opens a zero-shot detector that looks for the labels of a config.

    Its categories are the labels in their order, each with its place as its id.

    Args:
        config: With `model` and `labels`.
        device: cpu, cuda or cuda:N.
        num_threads: That torch uses on the CPU, in the whole process.

    Raises:
        UserError: No such model, one that cannot be read or is no zero-shot detector, labels that it cannot read, or
            a precision that the device has not.
    """
    assert config.model is not None and config.labels is not None
    model_type = check_zero_shot(config.model)
    labels = check_labels(config.labels)

    from raydet.engines.zero_shot_models import GroundingDinoEngine, OwlEngine

    engine_class = OwlEngine if model_type in OWL_TYPES else GroundingDinoEngine
    return engine_class(config.model, labels, config=config, device=device, num_threads=num_threads)

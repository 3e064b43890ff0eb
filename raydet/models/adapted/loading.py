"""Detectors that share the weights of their base.

Each detector has everything that its training changed: low-rank matrices, batch norms, decoder and class heads. The
frozen weights are in memory once. Nothing is switched between forward passes.
"""

from collections.abc import Iterator, Sequence

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from raydet.common.errors import UserError
from raydet.common.hub_client import offline_if_local
from raydet.models.adapted.layers import misfit, put_adapters
from raydet.models.adapters.description import AdapterFolder
from raydet.models.adapters.folder import digest_of, read_weights
from raydet.models.backbone import backbone_parameter_names
from raydet.models.checkpoints import CONFIG, PROCESSOR_FILES, categories_in
from raydet.models.detector import Detector, quiet
from raydet.models.families import Family
from raydet.models.geometry import ResizeRule
from raydet.models.loading import missing_weights, parse_config, read_config, read_model, read_processor
from raydet.models.processors import check_num_queries, resize_rule_of
from raydet.tables import storage


def load_adapted(base: str, adapters: Sequence[AdapterFolder]) -> Iterator[Detector]:
    """Load a model once for each of some adapters, in evaluation mode on the CPU.

    A caller that keeps all detectors keeps the weights that no adapter changes only once.

    Args:
        base: Folder or Hub name of the model that was adapted.
        adapters: Folders whose `model_type` is that of the base.

    Raises:
        UserError: An adapter does not belong to the base, or its images have another size than those of the first.
    """
    shared: dict[str, nn.Parameter] = {}
    first: ResizeRule | None = None
    for adapter in adapters:
        detector = _load(base, adapter, shared)
        first = first or detector.resize_rule
        if detector.resize_rule != first:
            raise UserError(
                f"--adapter {adapter.uri} takes images of {_size(detector.resize_rule)}, but {adapters[0].uri} of "
                f"{_size(first)}: the adapters of a run share their images; give it a run of its own"
            )
        yield detector


def adapted_resize_rule(base: str, adapter: AdapterFolder) -> ResizeRule:
    """Return the resize rule of an adapted model without loading its weights.

    Raises:
        UserError: Base or adapter cannot be read.
    """
    with quiet():
        _, family = _config(base, adapter)
        return resize_rule_of(_processor(base, adapter, family), where=adapter.uri)


def _load(base: str, adapter: AdapterFolder, shared: dict[str, nn.Parameter]) -> Detector:
    with quiet():
        config, family = _config(base, adapter)
        categories = categories_in(config.to_dict())
        if not categories:
            raise UserError(f"neither --adapter {adapter.uri} nor --checkpoint {base} names the classes (id2label)")
        with offline_if_local(base):
            model, fresh = read_model(base, config)
        processor = _processor(base, adapter, family)
    tensors, digest = read_weights(adapter.uri)
    missing = missing_weights(model, fresh - set(tensors))
    if missing:
        raise misfit(
            base, adapter, f"the base lacks {len(missing)} of its weights or has them in another shape", missing
        )
    own = backbone_parameter_names(model) - set(tensors)
    frozen = {name: parameter for name, parameter in model.named_parameters() if name in own}
    if digest is not None and digest_of(frozen) != digest:
        raise misfit(base, adapter, "it was trained beside frozen weights that are not those of the base")
    for name, parameter in frozen.items():
        _share(model, name, shared.setdefault(name, parameter))
    put_adapters(model, tensors, base, adapter)
    model.eval()
    detector = Detector(model, processor, categories, where=adapter.uri)
    check_num_queries(config, family, detector.resize_rule, num_queries=detector.num_queries, where=adapter.uri)
    return detector


def _config(base: str, adapter: AdapterFolder) -> tuple[PreTrainedConfig, Family]:
    """Read the config of the adapted model, which is that of the base if the adapter has none."""
    if not storage.exists(storage.join(adapter.uri, CONFIG)):
        with offline_if_local(base):
            return read_config(base)
    with offline_if_local(adapter.uri):
        return parse_config(adapter.uri)


def _processor(base: str, adapter: AdapterFolder, family: Family) -> object:
    has_one = any(storage.exists(storage.join(adapter.uri, name)) for name in PROCESSOR_FILES)
    place = adapter.uri if has_one else base
    with offline_if_local(place):
        return read_processor(place, family)


def _share(model: PreTrainedModel, name: str, parameter: nn.Parameter) -> None:
    """Put a parameter of another model into the place of one with the same value."""
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, parameter)


def _size(rule: ResizeRule) -> str:
    size_hw = rule.size_hw or rule.limit_hw
    if size_hw is not None:
        return f"{size_hw[1]} × {size_hw[0]} pixels"
    return f"{rule.shortest} to {rule.longest} pixels"

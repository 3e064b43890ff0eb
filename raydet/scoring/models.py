"""Facts about the model of a run and its adapters, known before it is loaded, and the schemas of its tables."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import pyarrow as pa

from raydet.common.console import Console
from raydet.common.errors import UserError
from raydet.common.redaction import without_secrets
from raydet.config import PredictConfig
from raydet.engines.selection import check_classes
from raydet.images.collection import Collection
from raydet.measuring.fitting.operating_point import FittedPoint
from raydet.models.adapters.description import AdapterFolder, read_adapters
from raydet.models.checkpoints import Checkpoint, fingerprint
from raydet.models.families import family_of
from raydet.scoring.kept import vectors_to_keep
from raydet.scoring.plan import OWN_TABLE
from raydet.tables.kept.columns import KeptVectors
from raydet.tables.kept.thumbnails import THUMBNAIL_FIELD
from raydet.tables.schema import Category, build_schema


@dataclass(frozen=True)
class ModelFacts:
    """Facts about a model that are known before it is loaded."""

    name: str
    """Absolute path or Hub name; of an adapter, its folder."""
    categories: tuple[Category, ...]
    fingerprint: str
    point: FittedPoint | None = None
    kept: KeptVectors | None = None
    examples: str | None = None
    """Fingerprint of the pictures of `--examples`."""
    adapted: "Mapping[str, ModelFacts]" = field(default_factory=dict)
    """The model with each adapter, by the adapter's name."""
    adapters: tuple[AdapterFolder, ...] = ()

    @property
    def by_table(self) -> "Mapping[str, ModelFacts]":
        """The models that write the tables, by the folder of each in OUT."""
        return self.adapted or {OWN_TABLE: self}


def check_adapters(config: PredictConfig, base: Checkpoint) -> ModelFacts:
    """Check the adapters of a config as far as this does not need their weights."""
    family = family_of(base.model_type, where=base.name)
    adapters = read_adapters(config.adapters)
    adapted: dict[str, ModelFacts] = {}
    for adapter in adapters:
        if adapter.model_type not in (None, base.model_type):
            raise UserError(
                f"--adapter {adapter.uri} adapts a {adapter.model_type} model, but --checkpoint {base.name} is a "
                f"{base.model_type} model; give the model that it was trained on{_named(adapter)}"
            )
        categories = adapter.categories or base.categories
        if not categories:
            raise UserError(
                f"neither --adapter {adapter.uri} nor --checkpoint {base.name} names the classes (id2label)"
            )
        try:
            check_classes(config.classes, categories)
        except UserError as error:
            raise UserError(f"--adapter {adapter.uri}: {error}") from None
        own = Checkpoint(adapter.uri, base.model_type, categories, adapter.content or base.content)
        kept = vectors_to_keep(config, own, family)
        adapted[adapter.name] = ModelFacts(adapter.uri, categories, adapter.fingerprint, kept=kept)
    return ModelFacts(base.name, base.categories, fingerprint(base.name), adapted=adapted, adapters=adapters)


def _named(adapter: AdapterFolder) -> str:
    return f", {adapter.base}" if adapter.base else ""


def check_fit(model: ModelFacts, console: Console) -> None:
    """Check the adapters of a model, if any, against the weights of their base, before any worker starts.

    Raises:
        UserError: One does not belong to the base, or has images of another size than the others.
    """
    if not model.adapters:
        return
    with console.progress("checking the adapters", leaves_line=False):
        from raydet.models.adapted.loading import load_adapted  # imports torch

        for _ in load_adapted(model.name, model.adapters):
            pass


def schema_of(model: ModelFacts, images: Collection, config: PredictConfig, *, base: ModelFacts | None) -> pa.Schema:
    """Build the schema of a table; `base` is the model that was adapted, if any."""
    metadata = {"checkpoint": without_secrets(model.name), "checkpoint_hash": model.fingerprint}
    if base is not None:
        metadata |= {"base": without_secrets(base.name), "base_hash": base.fingerprint}
    if model.point is not None:
        metadata["operating_point"] = model.point.fingerprint
    extra_fields = [*images.extra_fields, *([THUMBNAIL_FIELD] if "thumbnail" in (config.keep or ()) else [])]
    if model.kept is not None:
        return model.kept.schema(model.categories, metadata, extra_fields)
    return build_schema("detections", model.categories, extra_fields=extra_fields, extra_metadata=metadata)

"""The training images that the options of a run name: tables with weights, merged classes, repeated rare classes."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from raydet.common.class_names import folded
from raydet.common.console import counted
from raydet.common.errors import UserError, one_line
from raydet.common.untrusted.documents import DocumentError
from raydet.config import TrainConfig
from raydet.tables import storage
from raydet.tables.columns import Floats, Integers, flatten
from raydet.tables.schema import Category
from raydet.tables.table import Table, open_table
from raydet.training.feeding.mixture import Mixture, Source
from raydet.training.feeding.repeats import Repeats

_BATCH_ROWS = 65_536
_MOST_WEIGHT = 100.0
_MOST_CLASSES_SHOWN = 10


@dataclass(frozen=True)
class Shown:
    """What an epoch shows of a table.

    Attributes:
        uri: The images table.
        weight: Its weight.
        num_images: Its images.
        images_per_epoch: Images per epoch, on average.
        boxes_per_epoch: Boxes per epoch of each class of the mixture, on average, float64 [C].
    """

    uri: str
    weight: float
    num_images: int
    images_per_epoch: float
    boxes_per_epoch: Floats


def with_absolute_sources(config: TrainConfig) -> TrainConfig:
    """Return the config with absolute URIs of its tables and with the content of the file of `rename_classes`.

    Raises:
        UserError: A weight or the file is invalid.
    """
    pairs = [(storage.absolute_uri(uri), weight) for uri, weight in weighted(config.train_data)]
    written = [uri if weight == 1 else f"{uri}:{weight:g}" for uri, weight in pairs]
    return replace(
        config,
        train_data=written[0] if len(written) == 1 else written,
        val_data=storage.absolute_uri(config.val_data),
        rename_classes=_renamed(config.rename_classes),
    )


def weighted(train_data: str | Sequence[str]) -> list[tuple[str, float]]:
    """Return the URI and the weight of each table, as written `URI` or `URI:WEIGHT`.

    Raises:
        UserError: A weight is 0, or a table is named twice.
    """
    result = []
    for text in [train_data] if isinstance(train_data, str) else train_data:
        match = re.fullmatch(r"(.+):(\d+\.?\d*|\.\d+)", text)
        # A larger number ends an address, such as a port.
        if match is None or float(match[2]) > _MOST_WEIGHT:
            result.append((text, 1.0))
            continue
        if float(match[2]) == 0:
            raise UserError(f"--train-data {text}: the weight must be above 0; omit the table instead")
        result.append((match[1], float(match[2])))
    uris = [storage.absolute_uri(uri) for uri, _ in result]
    twice = [uri for uri in uris if uris.count(uri) > 1]
    if twice:
        raise UserError(f"--train-data names {twice[0]} twice; use a weight, such as {twice[0]}:2")
    return result


def open_sources(config: TrainConfig) -> Table | Mixture:
    """Open the training tables; a single one without weight, new names and repeats remains a `Table`.

    Raises:
        UserError: A table is missing, has no images or no classes, or an option is invalid.
    """
    sources = weighted(config.train_data)
    tables = [open_table(uri, "images") for uri, _ in sources]
    for table in tables:
        if table.num_rows == 0:
            raise UserError(f"--train-data {table.uri} has no images")
        if not table.categories:
            raise UserError(f"--train-data {table.uri} has no classes: it was prepared without labels")
    weights = [weight for _, weight in sources]
    names = _renamed(config.rename_classes)
    _check_names(names or {}, tables)
    if len(tables) == 1 and not names and weights == [1.0] and config.repeat_rare is None:
        return tables[0]
    mixture = merged(tables, weights, names or {})
    if config.repeat_rare is not None:
        factors = _factors(mixture, config.repeat_rare)
    elif weights != [1.0] * len(weights):
        factors = np.repeat(weights, [table.num_rows for table in tables])
    else:
        return mixture
    return replace(mixture, repeats=Repeats(factors))


def images_per_epoch(config: TrainConfig) -> int:
    """Return the number of images per epoch; an image counts as often as it is shown.

    Raises:
        UserError: See `open_sources`.
    """
    data = open_sources(config)
    return data.num_shown if isinstance(data, Mixture) else data.num_rows


def open_renamed(uri: str, config: TrainConfig) -> Table | Mixture:
    """Open the validation table, with the new names of its classes.

    Raises:
        UserError: The table is missing, or the file of `rename_classes` is invalid.
    """
    table, names = open_table(uri, "images"), _renamed(config.rename_classes) or {}
    known = {category.name for category in table.categories}
    return merged([table], [1.0], names) if known & set(names) else table


def merged(tables: Sequence[Table], weights: Sequence[float], names: Mapping[str, str]) -> Mixture:
    """Merge tables and their classes.

    Classes of equal names are one class. Between tables, case, underscores and spaces in the names do not matter,
    unless a table has several classes that differ in nothing else.

    Args:
        tables: Images tables.
        weights: Weight of each.
        names: New names of classes.
    """
    categories: list[Category] = []
    index_of: dict[str, int] = {}
    sources = []
    for table, weight in zip(tables, weights, strict=True):
        alike: dict[str, list[int]] = {}
        for index, category in enumerate(categories):
            alike.setdefault(folded(category.name), []).append(index)
        own = [names.get(category.name, category.name) for category in table.categories]
        own_alike = [folded(name) for name in dict.fromkeys(own)]
        class_map = []
        for name in own:
            same = alike.get(folded(name), [])
            if name not in index_of and len(same) == 1 and own_alike.count(folded(name)) == 1:
                class_map.append(same[0])
                continue
            if name not in index_of:
                index_of[name] = len(categories)
                categories.append(Category(len(categories), name))
            class_map.append(index_of[name])
        sources.append(Source(table, weight, tuple(class_map)))
    if len(tables) == 1 and len(categories) == len(tables[0].categories):
        categories = [replace(own, name=new.name) for own, new in zip(tables[0].categories, categories, strict=True)]
    return Mixture(tuple(sources), tuple(categories))


def shown_of(mixture: Mixture) -> list[Shown]:
    """Return what an epoch shows of each table; reads the classes of all boxes.

    Raises:
        UserError: A table is damaged.
    """
    result, first = [], 0
    num_classes = len(mixture.categories)
    for source in mixture.sources:
        boxes, images = np.zeros(num_classes), 0.0
        for num_rows, owners, classes in _classes_of(source):
            factors = np.ones(num_rows) if mixture.repeats is None else mixture.repeats.factors[first:][:num_rows]
            boxes += np.bincount(classes, weights=factors[owners], minlength=num_classes)
            images += float(factors.sum())
            first += num_rows
        result.append(Shown(source.table.uri, source.weight, source.table.num_rows, images, boxes))
    return result


def lines_of(mixture: Mixture, shown: Sequence[Shown]) -> list[str]:
    """Describe for the terminal what an epoch shows."""
    lines = [f"{mixture.num_shown:,} images per epoch, of {counted(mixture.num_rows, 'image')}:"]
    lines += [
        f"  {one.images_per_epoch:,.0f} of {one.num_images:,} in {one.uri}"
        + (f" (weight {one.weight:g})" if one.weight != 1 else "")
        for one in shown
    ]
    boxes = np.stack([one.boxes_per_epoch for one in shown], axis=1)
    order = np.argsort(-boxes.sum(axis=1), kind="stable")
    lines.append("boxes per epoch by class" + (", and of each table:" if len(shown) > 1 else ":"))
    for index in order[:_MOST_CLASSES_SHOWN].tolist():
        of_each = " + ".join(f"{number:,.0f}" for number in boxes[index])
        parts = f" = {of_each}" if len(shown) > 1 else ""
        lines.append(f"  {mixture.categories[index].name}: {boxes[index].sum():,.0f}{parts}")
    if len(order) > _MOST_CLASSES_SHOWN:
        rest = order[_MOST_CLASSES_SHOWN:]
        lines.append(f"  {counted(len(rest), 'other class')}: {boxes[rest].sum():,.0f}")
    return lines


def record_of(mixture: Mixture, shown: Sequence[Shown]) -> dict[str, Any]:
    """Return what an epoch shows, for a JSON file."""
    names = [category.name for category in mixture.categories]
    return {
        "images_per_epoch": mixture.num_shown,
        "tables": [
            {
                "uri": one.uri,
                "weight": one.weight,
                "images": one.num_images,
                "images_per_epoch": round(one.images_per_epoch, 3),
                "boxes_per_epoch": dict(zip(names, one.boxes_per_epoch.round(3).tolist(), strict=True)),
            }
            for one in shown
        ],
    }


def _factors(mixture: Mixture, threshold: float) -> Floats:
    """Return how often each image is shown per epoch.

    An image is shown `weight` times its repeat factor (Gupta et al., "LVIS", 2019): the largest √(threshold / f) of its
    classes, at least 1, where f is the fraction of the images with the class. Images count by the weight of their
    table.
    """
    num_classes = len(mixture.categories)
    with_class, total = np.zeros(num_classes), 0.0
    for source in mixture.sources:
        for num_rows, owners, classes in _classes_of(source):
            distinct = np.unique(owners * num_classes + classes) % num_classes
            with_class += source.weight * np.bincount(distinct, minlength=num_classes)
            total += source.weight * num_rows
    of_class = np.sqrt(threshold * total / np.maximum(with_class, np.finfo(float).tiny))
    of_class = np.maximum(of_class, 1.0)
    parts = []
    for source in mixture.sources:
        for num_rows, owners, classes in _classes_of(source):
            factors = np.ones(num_rows)
            np.maximum.at(factors, owners, of_class[classes])
            parts.append(source.weight * factors)
    return np.concatenate(parts)


def _classes_of(source: Source) -> Iterator[tuple[int, Integers, Integers]]:
    """Yield, for each batch of rows, their number, and for each box the place of its row and its class."""
    class_map = np.asarray(source.class_map, np.int64)
    for batch in source.table.iter_batches(("objects",), batch_size=_BATCH_ROWS):
        num_boxes, columns = flatten(batch, "objects", ("category",), source.table.uri)
        yield batch.num_rows, np.repeat(np.arange(batch.num_rows), num_boxes), class_map[columns["category"]]


def _renamed(given: dict[str, str] | str | None) -> dict[str, str] | None:
    """Return the new names of classes, from a file if they are in one.

    Raises:
        UserError: The file cannot be read, or holds something else.
    """
    if not isinstance(given, str):
        return given or None
    try:
        content = storage.read_yaml(given)
    except FileNotFoundError:
        raise UserError(f"--rename-classes: no such file: {given}") from None
    except (DocumentError, OSError) as error:
        raise UserError(f"--rename-classes: cannot read {given}: {one_line(error)}") from None
    if not isinstance(content, dict) or not all(
        isinstance(text, str) and text for pair in content.items() for text in pair
    ):
        raise UserError(f"--rename-classes: {given} must hold lines `OLD: NEW`, with a name of a class on both sides")
    return content or None


def _check_names(names: Mapping[str, str], tables: Sequence[Table]) -> None:
    known = {category.name for table in tables for category in table.categories}
    for name in names:
        if name not in known:
            raise UserError(
                f"--rename-classes: no table of --train-data has a class {name}; they have {', '.join(sorted(known))}"
            )

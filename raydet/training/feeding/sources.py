"""The training images that the options of a run name: tables with weights, merged classes, repeated rare classes."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from raydet.common.class_names import folded, indices_in, is_unused
from raydet.common.errors import UserError
from raydet.config import TrainConfig
from raydet.config.training import MOST_WEIGHT
from raydet.preparation.sources.scored.pairing import OtherImagesError, places_of
from raydet.tables import storage
from raydet.tables.columns import Integers
from raydet.tables.kept.columns import KeptVectors
from raydet.tables.schema import Category
from raydet.tables.table import Table, open_table
from raydet.training.feeding.counts import repeat_factors
from raydet.training.feeding.mixture import Mixture, WeightedTable
from raydet.training.feeding.repeats import Repeats
from raydet.training.feeding.teachers import NOT_SCORED, Teacher


def with_absolute_sources(config: TrainConfig) -> TrainConfig:
    """Return the config with absolute URIs of its tables and with the content of the file of `rename_classes`.

    Raises:
        UserError: A weight or the file is invalid.
    """
    return replace(
        config,
        train_data=_absolute(config.train_data, "train-data"),
        teacher=None if config.teacher is None else _absolute(config.teacher, "teacher"),
        val_data=storage.absolute_uri(config.val_data),
        rename_classes=_renamed(config.rename_classes),
    )


def _absolute(tables: str | list[str], option: str) -> str | list[str]:
    written = [with_weight(storage.absolute_uri(uri), weight) for uri, weight in weighted(tables, option)]
    return written[0] if len(written) == 1 else written


def with_weight(uri: str, weight: float) -> str:
    """Write a table and its weight so that `weighted` reads them."""
    return uri if weight == 1 else f"{uri}:{weight!r}"


def weighted(tables: str | Sequence[str], option: str = "train-data") -> list[tuple[str, float]]:
    """Return the URI and the weight of each table, as written `URI` or `URI:WEIGHT`; `option` names them in messages.

    Raises:
        UserError: A weight is 0, or a table is named twice.
    """
    result = []
    for text in [tables] if isinstance(tables, str) else tables:
        match = re.fullmatch(r"(.+):((?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)", text)
        # A larger number ends an address, such as a port.
        if match is None or float(match[2]) > MOST_WEIGHT:
            result.append((text, 1.0))
            continue
        if float(match[2]) == 0:
            raise UserError(f"--{option} {text}: the weight must be above 0; omit the table instead")
        result.append((match[1], float(match[2])))
    uris = [storage.absolute_uri(uri) for uri, _ in result]
    twice = [uri for uri in uris if uris.count(uri) > 1]
    if twice:
        raise UserError(f"--{option} names {twice[0]} twice; use a weight, such as {twice[0]}:2")
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
        if not table.categories and config.teacher is None:
            raise UserError(f"--train-data {table.uri} has no classes: it was prepared without labels")
    weights = [weight for _, weight in sources]
    names = _renamed(config.rename_classes)
    _check_names(names or {}, [*tables, *_others(config)])
    is_plain = not names and weights == [1.0] and config.repeat_rare is None and config.teacher is None
    if len(tables) == 1 and is_plain:
        return tables[0]
    mixture = merged(tables, weights, names or {})
    if config.teacher is not None:
        mixture = _with_teachers(mixture, config.teacher, names or {})
    return with_repeats(mixture, config.repeat_rare)


def with_repeats(mixture: Mixture, repeat_rare: float | None) -> Mixture:
    """Repeat images by the weights of their tables and, with a threshold, by their rare classes.

    With a threshold the classes of all boxes are read.

    Raises:
        UserError: A table is damaged.
    """
    weights = [source.weight for source in mixture.sources]
    if repeat_rare is not None:
        factors = repeat_factors(mixture, repeat_rare)
    elif weights != [1.0] * len(weights):
        factors = np.repeat(weights, [source.table.num_rows for source in mixture.sources])
    else:
        return mixture
    return replace(mixture, repeats=Repeats(factors))


def _with_teachers(mixture: Mixture, teacher: str | list[str], names: Mapping[str, str]) -> Mixture:
    """Add teachers; images that are not labelled at all get the classes that the teachers know.

    Raises:
        UserError: A table lacks class scores, or is about other images; or an unlabelled table has no teacher.
    """
    opened = [(open_table(uri, "detections"), weight) for uri, weight in weighted(teacher, "teacher")]
    for table, _ in opened:
        kept = KeptVectors.of_table(table.schema, table.uri)
        if kept is None or kept.class_scores is None:
            raise UserError(
                f"--teacher {table.uri} has no class scores; score the training images with `raydet predict --keep "
                "class_scores`"
            )
    if not mixture.categories:
        distinct = dict.fromkeys(
            names.get(category.name, category.name)
            for table, _ in opened
            for index, category in enumerate(table.categories)
            if not is_unused(category.name, index)
        )
        mixture = replace(mixture, categories=tuple(Category(number, name) for number, name in enumerate(distinct)))
    num_classes = len(mixture.categories)
    teachers = tuple(
        Teacher(table, weight, _places_of(mixture, table), _class_map(mixture, table, names), num_classes)
        for table, weight in opened
    )
    first = 0
    for source in mixture.sources:
        own = slice(first, first := first + source.table.num_rows)
        if not source.class_map and all((one.places[own] == NOT_SCORED).all() for one in teachers):
            raise UserError(f"--train-data {source.table.uri} has no classes, and no --teacher has scored its images")
    return replace(mixture, teachers=teachers)


def _places_of(mixture: Mixture, found: Table) -> Integers:
    """Return the row of the detections of each image of the tables that they are about, `NOT_SCORED` for the others."""
    parts, errors = [], []
    spaces = [source.table.manifest.get("id_space") for source in mixture.sources]
    space = found.manifest.get("id_space")
    for source, own in zip(mixture.sources, spaces, strict=True):
        try:
            # Equal names in several folders are no proof, but two tables do not number their images alike.
            if space is not None and own not in (None, space) and space in spaces:
                raise OtherImagesError(f"{found.uri} is about another table")
            places = places_of(source.table, found)
            parts.append(np.arange(source.table.num_rows) if places is None else places)
        except OtherImagesError as error:
            errors.append(error)
            parts.append(np.full(source.table.num_rows, NOT_SCORED))
    if len(errors) == len(parts):
        raise UserError(f"--teacher: {errors[-1]}")
    return np.concatenate(parts)


def _class_map(mixture: Mixture, found: Table, names: Mapping[str, str]) -> Integers:
    """Return the index in the mixture of each class of the detections, -1 if there is none."""
    theirs = [names.get(category.name, category.name) for category in found.categories]
    own = [category.name for category in mixture.categories]
    class_map = indices_in(theirs, own)
    if (class_map < 0).all():
        raise UserError(
            f"--teacher {found.uri} knows none of the classes {', '.join(own)}; its classes are {', '.join(theirs)}"
        )
    return class_map


def open_renamed(config: TrainConfig) -> Table | Mixture:
    """Open the validation table, with the new names of its classes.

    Raises:
        UserError: The table is missing, or the file of `rename_classes` is invalid.
    """
    table, names = open_table(config.val_data, "images"), _renamed(config.rename_classes) or {}
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
        sources.append(WeightedTable(table, weight, tuple(class_map)))
    if len(tables) == 1 and len(categories) == len(tables[0].categories):
        categories = [replace(own, name=new.name) for own, new in zip(tables[0].categories, categories, strict=True)]
    return Mixture(tuple(sources), tuple(categories))


def _renamed(given: dict[str, str] | str | None) -> dict[str, str] | None:
    """Return the new names of classes, from a file if they are in one.

    Raises:
        UserError: The file cannot be read, or holds something else.
    """
    if not isinstance(given, str):
        return given or None
    if given.startswith("{"):  # YAML reads {a:b} as one word
        raise UserError(
            f"--rename-classes must be written as '{{OLD: NEW}}', with a blank after the colon; got {given}"
        )
    try:
        content = storage.read_given_yaml(given, "file")
    except UserError as error:
        raise UserError(f"--rename-classes: {error}") from None
    if not isinstance(content, dict) or not all(
        isinstance(text, str) and text for pair in content.items() for text in pair
    ):
        raise UserError(f"--rename-classes: {given} must hold lines `OLD: NEW`, with a name of a class on both sides")
    return content or None


def _others(config: TrainConfig) -> Iterator[Table]:
    """Yield the further tables whose classes may get new names."""
    if config.rename_classes:
        yield open_table(config.val_data, "images")
        for uri, _ in weighted(config.teacher or [], "teacher"):
            yield open_table(uri, "detections")


def _check_names(names: Mapping[str, str], tables: Sequence[Table]) -> None:
    known = {category.name for table in tables for category in table.categories}
    for name in names:
        if name not in known:
            raise UserError(f"--rename-classes: no table has a class {name}; they have {', '.join(sorted(known))}")

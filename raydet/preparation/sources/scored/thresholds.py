"""The least score of a detection that becomes a label, for each class."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from raydet.common.class_names import indices_in, is_unused
from raydet.common.errors import UserError, one_line
from raydet.common.untrusted.documents import DocumentError
from raydet.config import PrepareDetectionsConfig
from raydet.tables import storage
from raydet.tables.columns import BATCH_ROWS, take_detections, take_truth
from raydet.tables.table import Table

_OTHERS = "default"
"""Key of the threshold of all classes that a file does not name, unless a class has this name."""


def choose_thresholds(found: Table, config: PrepareDetectionsConfig) -> list[float | None]:
    """Return the threshold of each class of a detections table; None gives a class no labels.

    Raises:
        UserError: The file or the truth cannot be used, or no class reaches the target precision.
    """
    if config.thresholds is not None:
        return _read_thresholds(config.thresholds, [category.name for category in found.categories])
    if config.target_precision is not None:
        return _fit_thresholds(found, config, config.target_precision)
    return [config.threshold] * len(found.categories)


def check_thresholds(config: PrepareDetectionsConfig, class_names: Sequence[str]) -> None:
    """Check what `choose_thresholds` will read, before there are detections of these classes; raises as it does."""
    if config.thresholds is not None:
        _read_thresholds(config.thresholds, class_names)
    if config.truth is not None:
        from raydet.measuring.truth import read_truth  # as in `_fit_thresholds`

        read_truth(config.truth)


def _read_thresholds(uri: str, names: Sequence[str]) -> list[float | None]:
    given = _read_file(uri)
    has_others = _OTHERS in given and _OTHERS not in names
    others = given.pop(_OTHERS) if has_others else None
    values = list(given.values())
    places = indices_in(names, list(given)).tolist()
    known = ", ".join(name for index, name in enumerate(names) if not is_unused(name, index))
    unknown = [name for place, name in enumerate(given) if place not in places]
    if unknown:
        raise UserError(f"--thresholds {uri} names {unknown[0]!r}, which is no class of the detections: {known}")
    missing = [name for index, name in enumerate(names) if places[index] < 0 and not is_unused(name, index)]
    if missing and not has_others:
        raise UserError(
            f"--thresholds {uri} has no threshold for {', '.join(map(repr, missing))}; name every class, or set "
            f"`{_OTHERS}` for all others"
        )
    return [others if place < 0 else values[place] for place in places]


def _read_file(uri: str) -> dict[str, float | None]:
    try:
        content = storage.read_json(uri) if uri.endswith(".json") else storage.read_yaml(uri)
    except FileNotFoundError:
        raise UserError(f"no such file: --thresholds {uri}") from None
    except (DocumentError, OSError) as error:
        raise UserError(f"cannot read --thresholds {uri}: {one_line(error)}") from None
    if not isinstance(content, dict) or not content:
        raise UserError(f"--thresholds {uri} must hold a threshold for each class, as `class name: score`")
    for name, value in content.items():
        if not isinstance(name, str):
            raise UserError(f"--thresholds {uri}: class names must be texts; write {name!r:.80} in quotes")
        if not _is_threshold(value):
            raise UserError(
                f"--thresholds {uri}: the threshold of {name!r:.80} must be a number above 0 and at most 1, or null; "
                f"got {value!r:.80}"
            )
    return content


def _is_threshold(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1)


def _fit_thresholds(found: Table, config: PrepareDetectionsConfig, target_precision: float) -> list[float | None]:
    """Choose the thresholds that `evaluate --target-precision` reports, on the images that have truth."""
    # Imported here because the other rules do without them.
    from raydet.measuring.detections import DETECTION_FIELDS, map_categories, read_detection_rows
    from raydet.measuring.diagnosis.scores import outcomes_at, threshold_at_precision
    from raydet.measuring.joining import join_images, list_images, rows_among
    from raydet.measuring.numbers.matching import match, match_in_parts
    from raydet.measuring.truth import read_truth

    assert config.truth is not None, "the config asks for both"
    truth = read_truth(config.truth)
    images = list_images(found, truth.images.image_ids if config.join == "id" else None)
    if not images.image_ids.size:
        raise UserError(
            f"{found.uri} has none of the images of --truth {truth.uri}; if their ids differ, set --join path"
        )
    joined = join_images(truth.images, images, by=config.join, allow_partial=True)
    is_joined = joined.truth_row >= 0
    batches = rows_among(found.iter_batches(DETECTION_FIELDS, BATCH_ROWS), images.image_ids[is_joined])
    rows = read_detection_rows(found, truth, batches).columns
    places = replace(joined, truth_row=joined.truth_row[is_joined]).rows_of(len(truth.images.image_ids))
    matches = match_in_parts(
        take_truth(truth.columns, joined.truth_rows),
        take_detections(rows, places[joined.truth_rows]),
        lambda labelled, detected, _: match(labelled, detected, len(truth.categories)),
    )
    fitted = [
        threshold_at_precision(scores, is_right, target_precision)
        for scores, is_right, _ in outcomes_at(matches).by_class()
    ]
    thresholds = [None if place < 0 else fitted[place] for place in map_categories(found, truth).tolist()]
    if all(threshold is None for threshold in thresholds):
        raise UserError(
            f"the detections of no class reach the precision {target_precision:g} on the "
            f"{len(joined.truth_rows):,} images of {truth.uri} that were scored; lower --target-precision"
        )
    return thresholds

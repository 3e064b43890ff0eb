"""Truth and detections, as tables or as COCO JSON → COCO's numbers, on the screen and as metrics tables."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raydet.common.errors import UserError
from raydet.config import EvaluateConfig, config_hash
from raydet.measuring import metrics_folder
from raydet.measuring.detections import Scored, read_detections
from raydet.measuring.numbers.matches import COCO, Matches, Protocol, take_images
from raydet.measuring.numbers.matching import Matcher, match, match_in_parts
from raydet.measuring.numbers.metrics import CocoNumbers, CocoResult, accumulate, metrics_of
from raydet.measuring.result import Block, Evaluation, Measured, Row
from raydet.measuring.truth import Truth, is_json, read_extra_columns, read_truth
from raydet.tables import storage
from raydet.tables.schema import Category

if TYPE_CHECKING:
    from raydet.measuring.slices import Slice


def evaluate(config: EvaluateConfig) -> Evaluation:
    """Measures detections against the truth by COCO's rules, or by those of another protocol.

    COCO's numbers equal pycocotools' to the last bit, for tables and JSON alike, whatever the order of the rows and
    the number of shards. Of several detections with one score in an image, the one that stands first is matched
    first. With `config.out`, the run's rows are put into the tables OUT/metrics, OUT/per_image and so on, beside
    those of other runs, once everything is computed.

    Raises:
        UserError: An input is missing, damaged or not what it should be, or does not fit the other, or `config.out`
            holds something else. Nothing has been written then.
    """
    config = dataclasses.replace(
        config,
        truth=storage.absolute_uri(config.truth),
        detections=storage.absolute_uri(config.detections),
        out=None if config.out is None else storage.absolute_uri(config.out),
        run=config.run or _name_of(config.detections),
        split=config.split or _name_of(config.truth),
    )
    if config.protocol != "coco" and config.max_detections is not None:
        raise UserError(f"--protocol {config.protocol} has its own rules: leave out --max-detections")
    if config.out is not None:
        assert config.run is not None
        metrics_folder.check_folder(config.out, config.run, config_hash(config))
    truth = read_truth(config.truth, lvis=config.protocol == "lvis")
    is_table = not is_json(config.detections, "detections", "a detections table or COCO results JSON")
    if is_table and config.protocol == "coco" and config.out is None and not config.slice_by:
        return _numbers_alone(config, truth)
    scored, matches = _match(config, truth)
    slices = _slices(config, truth, scored)
    categories = () if config.class_agnostic else truth.categories
    frequency = truth.federated.frequency if truth.federated is not None else None

    def measure(part: Matches, *, num_detections: int | None = None, num_unreadable: int = 0) -> _Numbers:
        result = accumulate(part, categories, num_detections=num_detections, num_unreadable=num_unreadable)
        return _by_protocol(config.protocol, part, result, categories, frequency)

    whole = measure(matches, num_detections=scored.num_detections, num_unreadable=len(scored.errors))
    measured = _with_intervals(config, None, whole.blocks, matches, int((~scored.truth_columns.iscrowd).sum()))
    evaluation = Evaluation(
        result=whole.result,
        out=config.out,
        whole=measured,
        slices=tuple(_measure_slice(config, part, matches, measured, measure) for part in slices),
        num_left_out=scored.num_left_out,
    )
    if config.out is not None:
        # What it needs takes a second to import, and numbers on the screen do not need it.
        from raydet.measuring.result_tables import write_tables

        write_tables(config, truth, scored, matches, evaluation)
    return evaluation


def _numbers_alone(config: EvaluateConfig, truth: Truth) -> Evaluation:
    """COCO's numbers over all images; more would need all detections in memory."""
    # Only tables of detections need it.
    from raydet.measuring.shards import measure_shards

    scored, result = measure_shards(config, truth, _protocol_of(config))
    num_truth = int((~scored.truth_columns.iscrowd).sum())
    measured = Measured(None, _coco_blocks(result), None, len(scored.truth_rows), num_truth)
    return Evaluation(result=result, out=None, whole=measured, num_left_out=scored.num_left_out)


def _name_of(uri: str) -> str:
    return uri.partition("?")[0].rstrip("/").rsplit("/", 1)[-1].removesuffix(".json")


# Matching.


def _protocol_of(config: EvaluateConfig) -> Protocol:
    return Protocol(
        iou_thresholds=tuple(config.iou_thresholds or COCO.iou_thresholds),
        max_detections=tuple(config.max_detections or COCO.max_detections),
        class_agnostic=config.class_agnostic,
    )


def _match(config: EvaluateConfig, truth: Truth) -> tuple[Scored, Matches]:
    """Reads the detections and matches them, here or on a cluster."""
    protocol = _protocol_of(config)
    if config.ray_address is not None:
        if config.protocol != "coco" or is_json(config.detections, "detections", "a detections table"):
            raise UserError("address: a cluster matches detections tables by the protocol coco; leave out address")
        from raydet.measuring.shards import match_on_cluster

        return match_on_cluster(config, truth, protocol)
    scored = read_detections(config.detections, truth, allow_partial=config.allow_partial)
    matcher = _matcher(config, truth, scored, protocol)
    return scored, match_in_parts(scored.truth_columns, scored.columns, matcher, num_parts=config.num_shards)


def _matcher(config: EvaluateConfig, truth: Truth, scored: Scored, protocol: Protocol) -> Matcher:
    num_categories = len(truth.categories)
    if config.protocol == "coco":
        return lambda labelled, found, _: match(labelled, found, num_categories, protocol)
    from raydet.measuring.numbers.protocols import match_lvis, match_voc

    if config.protocol != "lvis":
        return lambda labelled, found, _: match_voc(labelled, found, num_categories)
    assert truth.federated is not None
    lists = (truth.federated.negatives, truth.federated.not_exhaustive)
    negatives, not_exhaustive = ([of_image[row] for row in scored.truth_rows.tolist()] for of_image in lists)
    return lambda labelled, found, images: match_lvis(
        labelled, found, num_categories, negatives[images], not_exhaustive[images]
    )


# Numbers.


@dataclass(frozen=True)
class _Numbers:
    result: CocoResult
    blocks: tuple[Block, ...]


def _by_protocol(
    protocol: str,
    matches: Matches,
    result: CocoResult,
    categories: Sequence[Category],
    frequency: Sequence[str] | None,
) -> _Numbers:
    """The numbers of a protocol, in a result and as rows."""
    if protocol == "coco":
        return _Numbers(result, _coco_blocks(result))
    from raydet.measuring.numbers.protocols import lvis_rows, voc_rows

    if protocol == "lvis":
        rows = lvis_rows(matches, categories, frequency)
    else:
        rows = voc_rows(matches, categories, eleven_points=protocol == "voc07")
    overall = [row for row in rows if row[1] is None]
    of_classes = [row for row in rows if row[1] is not None]
    size = len(of_classes) // len(categories)
    blocks = (overall, *(of_classes[start : start + size] for start in range(0, len(of_classes), size)))
    per_class = tuple(CocoNumbers(**_fields(block)) for block in blocks[1:])
    counts = {
        item.name: getattr(result, item.name)
        for item in dataclasses.fields(CocoResult)
        if item.name not in {own.name for own in dataclasses.fields(CocoNumbers)}
    }
    return _Numbers(CocoResult(**{**counts, "per_class": per_class}, **_fields(overall)), blocks)


def _coco_blocks(result: CocoResult) -> tuple[Block, ...]:
    metrics = metrics_of(result.protocol)
    return tuple(
        [
            (item.name, name, item.iou, item.area, item.max_detections, _or_none(numbers.values[item.name]))
            for item in metrics
        ]
        for name, numbers in [
            (None, result),
            *zip((category.name for category in result.categories), result.per_class, strict=True),
        ]
    )


def _fields(block: Block) -> dict[str, Any]:
    values = {row[0]: -1.0 if row[5] is None else row[5] for row in block}
    names = {item.name for item in dataclasses.fields(CocoNumbers)}
    return {"values": values, **{name: value for name, value in values.items() if name in names}}


def _or_none(value: float) -> float | None:
    return None if value == -1 else value


def _slices(config: EvaluateConfig, truth: Truth, scored: Scored) -> "list[Slice]":
    if not config.slice_by:
        return []
    from raydet.measuring.slices import PROPERTIES, slices_of

    columns = read_extra_columns(truth) if set(config.slice_by) - set(PROPERTIES) else {}
    columns = {name: column.take(scored.truth_rows) for name, column in columns.items()}
    areas = dict(_areas_of(config))
    return [
        part
        for name in config.slice_by
        for part in slices_of(
            name, scored.truth_columns, columns=columns, sizes_hw=truth.sizes_hw[scored.truth_rows], areas=areas
        )
    ]


def _areas_of(config: EvaluateConfig) -> tuple[tuple[str, tuple[float, float]], ...]:
    return COCO.areas if config.protocol in ("coco", "lvis") else ()


def _measure_slice(
    config: EvaluateConfig, part: "Slice", matches: Matches, whole: Measured, measure: Callable[[Matches], _Numbers]
) -> Measured:
    """The numbers of some images, or those of one size of box that `whole` has already."""
    if part.images is not None:
        chosen = take_images(matches, part.images)
        return _with_intervals(config, part.name, measure(chosen).blocks, chosen, part.num_truth)
    letter = part.area[0]
    blocks = tuple(
        [(_without_size(row), *row[1:]) for row in block if row[3] == part.area and row[0].endswith(letter)]
        for block in whole.blocks
    )
    intervals = whole.intervals
    if intervals is not None:
        name = f"AP{letter}"
        intervals = dataclasses.replace(
            intervals,
            overall={"AP": intervals.overall[name]} if name in intervals.overall else {},
            per_class=tuple({"AP": own[name]} if name in own else {} for own in intervals.per_class),
        )
    return Measured(part.name, blocks, intervals, whole.num_images, part.num_truth)


def _without_size(row: Row) -> str:
    """The name that a number over one size of box has over all: APs → AP, ARs → AR100."""
    return "AP" if row[0].startswith("AP") else f"AR{row[4]}"


def _with_intervals(
    config: EvaluateConfig, name: str | None, blocks: tuple[Block, ...], matches: Matches, num_truth: int
) -> Measured:
    intervals = None
    # The intervals are of COCO's average precision; what is wanted for tables only is not worth half a minute.
    if config.out is not None and config.bootstrap and config.protocol == "coco":
        from raydet.measuring.bootstrap import intervals as draw_intervals

        intervals = draw_intervals(matches, num_resamples=config.bootstrap, seed=config.seed)
    return Measured(name, blocks, intervals, len(matches.image_ids), num_truth)

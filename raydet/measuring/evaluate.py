"""Measure detections against the truth (tables or COCO JSON), for the console and as metrics tables."""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from raydet.common.console import Console
from raydet.common.display.progress import Progress
from raydet.common.errors import UserError
from raydet.config import EvaluateConfig
from raydet.config.fields import with_options
from raydet.measuring import metrics_folder
from raydet.measuring.detections import Scored, read_detections
from raydet.measuring.numbers.matches import COCO, Matches, Protocol, take_images
from raydet.measuring.numbers.matching import Matcher, match, match_in_parts
from raydet.measuring.numbers.metrics import CocoNumbers, CocoResult, accumulate
from raydet.measuring.numbers.values import Block, MetricValue
from raydet.measuring.result import Evaluation, Measured
from raydet.measuring.truth import Truth, is_json, read_extra_columns, read_truth
from raydet.tables import storage
from raydet.tables.output_folder import OutputFolder
from raydet.tables.schema import Category

if TYPE_CHECKING:
    from raydet.measuring.slices import Slice


@with_options(EvaluateConfig)
def evaluate(config: EvaluateConfig, *, console: Console | None = None) -> Evaluation:
    """Measure detections against the truth under the rules of COCO or another protocol.

    COCO's numbers equal those of pycocotools to the last bit, for tables and JSON, regardless of the row order and the
    number of shards. Detections with equal scores in an image are matched in input order. With `config.out`, the rows
    of the run are written to the tables OUT/metrics, OUT/per_image etc., beside those of other runs, after all
    computation.

    Raises:
        UserError: An input is missing, damaged or of the wrong kind, the inputs do not match each other, or
            `config.out` holds something else. Nothing has been written in that case.
    """
    config = dataclasses.replace(
        config,
        truth=storage.absolute_uri(config.truth),
        detections=storage.absolute_uri(config.detections),
        crops=None if config.crops is None else storage.absolute_uri(config.crops),
        out=None if config.out is None else storage.absolute_uri(config.out),
        run=config.run or _name_of(config.detections),
        split=config.split or _name_of(config.truth),
    )
    if config.protocol != "coco" and config.max_detections is not None:
        raise UserError(f"--max-detections applies only to --protocol coco, not to {config.protocol}; omit it")
    opened = contextlib.nullcontext() if config.out is None else metrics_folder.open_for_run(config)
    with opened as folder, (console or Console()).progress("reading the truth") as progress:
        return _evaluate(config, folder, progress)


def _evaluate(config: EvaluateConfig, folder: OutputFolder | None, progress: Progress) -> Evaluation:
    truth = read_truth(config.truth, lvis=config.protocol == "lvis")
    is_table = not is_json(config.detections, "detections", "a detections table or COCO results JSON")
    if config.class_mapping:
        if not is_table:
            raise UserError("--class-mapping applies to detections tables; the classes of COCO results have no names")
        truth = replace(truth, class_mapping=config.class_mapping)
    if is_table and config.protocol == "coco" and config.out is None and not config.slice_by and not config.verify:
        return _numbers_alone(config, truth, progress)
    scored, matches = _match(config, truth, progress)
    slices = _slices(config, truth, scored)
    categories = () if config.class_agnostic else truth.categories
    frequency = truth.federated.frequency if truth.federated is not None else None

    def measure(part: Matches, *, num_detections: int | None = None, num_unreadable: int = 0) -> _Numbers:
        result = accumulate(part, categories, num_detections=num_detections, num_unreadable=num_unreadable)
        return _by_protocol(config.protocol, part, result, categories, frequency)

    progress.begin("measuring")
    whole = measure(matches, num_detections=scored.num_detections, num_unreadable=len(scored.errors))
    num_truth = int((~scored.truth_columns.iscrowd).sum())
    measured = _with_intervals(config, None, whole.blocks, matches, num_truth, progress)
    verification = None
    if config.verify:
        from raydet.measuring.verification import verify

        progress.begin("verifying with pycocotools")
        verification = verify(scored, matches, whole.result, categories, seed=config.seed)
    evaluation = Evaluation(
        result=whole.result,
        out=config.out,
        whole=measured,
        slices=tuple(_measure_slice(config, part, matches, measured, measure, progress) for part in slices),
        num_left_out=scored.num_left_out,
        num_other_class=scored.num_other_class,
        note=scored.note,
        verification=verification,
    )
    if folder is not None:
        # Imported here because its dependencies take a second to load and console output does not need them.
        from raydet.measuring.result_tables import write_tables

        progress.begin("writing the tables")
        write_tables(folder, config, truth, scored, matches, evaluation)
    return evaluation


def _numbers_alone(config: EvaluateConfig, truth: Truth, progress: Progress) -> Evaluation:
    """Return COCO's metrics over all images without tables or slices, which would need all detections in memory."""
    # Imported here because only detections tables need it.
    from raydet.measuring.shards import measure_shards

    scored, result = measure_shards(config, truth, _protocol_of(config), progress)
    num_truth = int((~scored.truth_columns.iscrowd).sum())
    measured = Measured(None, result.blocks(), len(scored.truth_rows), num_truth)
    return Evaluation(
        result=result,
        out=None,
        whole=measured,
        num_left_out=scored.num_left_out,
        num_other_class=scored.num_other_class,
        note=scored.note,
    )


def _name_of(uri: str) -> str:
    return uri.partition("?")[0].rstrip("/").rsplit("/", 1)[-1].removesuffix(".json")


def _protocol_of(config: EvaluateConfig) -> Protocol:
    return Protocol(
        iou_thresholds=tuple(config.iou_thresholds or COCO.iou_thresholds),
        max_detections=tuple(config.max_detections or COCO.max_detections),
        class_agnostic=config.class_agnostic,
    )


def _match(config: EvaluateConfig, truth: Truth, progress: Progress) -> tuple[Scored, Matches]:
    """Read the detections and match them, locally or on a cluster."""
    protocol = _protocol_of(config)
    if config.ray_address is not None:
        if config.protocol != "coco" or is_json(config.detections, "detections", "a detections table"):
            raise UserError("--ray-address requires --protocol coco and a detections table; omit --ray-address")
        from raydet.measuring.shards import match_on_cluster

        return match_on_cluster(config, truth, protocol, progress)
    progress.begin("reading the detections")
    scored = read_detections(config.detections, truth, join=config.join, allow_partial=config.allow_partial)
    matcher = _matcher(config, truth, scored, protocol)
    progress.begin("matching")
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
    """Return the metrics of a protocol, as a result and as records."""
    if protocol == "coco":
        return _Numbers(result, result.blocks())
    from raydet.measuring.numbers.protocols import lvis_blocks, voc_blocks

    if protocol == "lvis":
        blocks = lvis_blocks(matches, categories, frequency)
    else:
        blocks = voc_blocks(matches, categories, eleven_points=protocol == "voc07")
    overall, *per_class = ({value.metric: value.value for value in block} for block in blocks)
    numbers = tuple(CocoNumbers(values=values) for values in per_class)
    return _Numbers(dataclasses.replace(result, values=overall, per_class=numbers), blocks)


def _slices(config: EvaluateConfig, truth: Truth, scored: Scored) -> "list[Slice]":
    if not config.slice_by:
        return []
    from raydet.measuring.slices import PROPERTIES, slices_of

    columns = read_extra_columns(truth) if set(config.slice_by) - set(PROPERTIES) else {}
    columns = {name: column.take(scored.truth_rows) for name, column in columns.items()}
    if config.crops is not None:
        from raydet.measuring.answers.by_image import answers_by_image

        columns |= answers_by_image(config.crops, scored)
    areas = dict(COCO.areas) if config.protocol in ("coco", "lvis") else {}
    return [
        part
        for name in config.slice_by
        for part in slices_of(
            name, scored.truth_columns, columns=columns, sizes_hw=truth.images.sizes_hw[scored.truth_rows], areas=areas
        )
    ]


def _measure_slice(
    config: EvaluateConfig,
    part: "Slice",
    matches: Matches,
    whole: Measured,
    measure: Callable[[Matches], _Numbers],
    progress: Progress,
) -> Measured:
    """Return the metrics of a subset of the images, or those of one box size, which `whole` already contains."""
    if part.images is not None:
        chosen = take_images(matches, part.images)
        return _with_intervals(config, part.name, measure(chosen).blocks, chosen, part.num_truth, progress)
    letter = part.area[0]
    blocks = tuple(
        tuple(
            replace(value, metric=_without_size(value), slice=part.name)
            for value in block
            if value.area == part.area and value.metric.endswith(letter)
        )
        for block in whole.blocks
    )
    return Measured(part.name, blocks, whole.num_images, part.num_truth)


def _without_size(value: MetricValue) -> str:
    """Return the overall name of a metric for one box size: APs → AP, ARs → AR100."""
    return "AP" if value.metric.startswith("AP") else f"AR{value.max_detections}"


def _with_intervals(
    config: EvaluateConfig,
    name: str | None,
    blocks: tuple[Block, ...],
    matches: Matches,
    num_truth: int,
    progress: Progress,
) -> Measured:
    # Intervals are defined for COCO's AP. They take up to half a minute, so they are computed only for tables.
    if config.out is not None and config.bootstrap and config.protocol == "coco":
        from raydet.measuring.bootstrap import intervals as draw_intervals

        drawn = draw_intervals(matches, num_resamples=config.bootstrap, seed=config.seed, progress=progress)
        # If classes count as one, there are no per-class blocks.
        blocks = tuple(
            tuple(_with_interval(value, own.get(value.metric)) for value in block)
            for block, own in zip(blocks, [drawn.overall, *drawn.per_class], strict=False)
        )
    blocks = tuple(tuple(replace(value, slice=name) for value in block) for block in blocks)
    return Measured(name, blocks, len(matches.image_ids), num_truth)


def _with_interval(value: MetricValue, drawn: MetricValue | None) -> MetricValue:
    return value if drawn is None else replace(value, low=drawn.low, high=drawn.high)

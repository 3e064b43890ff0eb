"""A detector and two tables → the fastest INT8 graph that keeps its AP, with the figures of all that were tried."""

import dataclasses
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raydet.common.display.progress import Progress
from raydet.common.errors import UserError
from raydet.common.threads import available_cpus
from raydet.config import DEFAULT_MAX_PIXELS, ExportOpenvinoConfig
from raydet.engines.detector_engine import EngineBatch
from raydet.engines.openvino.engine import GraphInputs, OpenVinoEngine
from raydet.engines.openvino.graph import FloatPrecision
from raydet.exports.openvino.levels import LEVELS, FloatParts, Level
from raydet.exports.openvino.proof import MIN_SPEEDUP, FloatTrial, Int8Proof, Int8Trial
from raydet.exports.openvino.quantising import (
    cpu_instructions,
    kernels_of,
    layers_by_precision,
    quantise,
    supports_bf16,
)
from raydet.exports.receipt import class_indices, labelled_images
from raydet.images.collection import open_collection
from raydet.images.decode import DecodeError, decode
from raydet.measuring.bootstrap import paired_differences
from raydet.measuring.numbers.accumulator import CocoAccumulator, ImageDetections
from raydet.models.detector import Detector
from raydet.models.geometry import Image
from raydet.tables.table import Table

_ROUNDS = 12
_SECONDS_PER_TURN = 0.5
"""Roughly, for the float graph in fp32: long against the clock, short against what else the machine does."""
_MOST_TIMED_IMAGES = 64
_CALIBRATED_TOGETHER, _LEAST_PARTS = 16, 8
"""Consecutive rows of the table, at most, which one read gets; parts of the table that they come from, at least."""


@dataclass(frozen=True)
class _Variant:
    """Graph in INT8, with the modules of its layers in INT8 and in float."""

    level: Level
    graph: Any
    int8_layers: tuple[str, ...]
    float_layers: tuple[str, ...]


@dataclass(frozen=True)
class _Compiled:
    """Compiled graph to try; `variant` is None for the float graph."""

    variant: _Variant | None
    precision: FloatPrecision
    engine: OpenVinoEngine


def find_int8(
    detector: Detector, graph: Any, config: ExportOpenvinoConfig, tables: Mapping[str, Table], progress: Progress
) -> tuple[Any, Int8Proof]:
    """Try the levels of INT8, and take the fastest graph for which the interval excludes too large a loss of AP.

    AP is measured in the order of speed, until a graph passes; graphs that are no faster than float are not measured.

    Args:
        detector: The detector; its model may be without weights.
        graph: Its graph in float.
        config: Options.
        tables: Images tables `calibration` and `truth`.
        progress: Shows what is being done.

    Returns:
        The graph, None if none passes, and the figures.

    Raises:
        UserError: A table is damaged, has no readable image, or `truth` none of the model's classes; or the float graph
            has no AP to keep.
    """
    num_threads = available_cpus()

    precisions: tuple[FloatPrecision, ...] = ("fp32", "bf16") if supports_bf16() else ("fp32",)

    def compiled(variant: _Variant | None) -> list[_Compiled]:
        own = graph if variant is None else variant.graph
        return [
            _Compiled(variant, name, OpenVinoEngine(detector, own, precision=name, num_threads=num_threads))
            for name in precisions
        ]

    floats = compiled(None)
    judge = _Judge(detector, floats[0], config, tables["truth"], progress)
    samples = _Samples(floats[0].engine, tables["calibration"], config.calibration_images, progress)
    variants = _variants(detector, graph, samples, progress)
    candidates = [candidate for variant in variants for candidate in compiled(variant)]
    rates = _rates([*floats, *candidates], judge.timed_images(floats[0].engine.images_per_run), progress)
    trials, taken = judge.judged(candidates, _trials(candidates, rates, num_floats=len(floats)))
    chosen = None if taken is None else candidates[taken]
    variant = None if chosen is None else chosen.variant
    proof = Int8Proof(
        calibration=tables["calibration"].uri,
        num_calibration_images=samples.num_images,
        truth=tables["truth"].uri,
        num_images=judge.num_images,
        max_ap_drop=config.max_ap_drop,
        num_threads=num_threads,
        instructions=cpu_instructions(),
        ap_float=judge.ap_float,
        floats=tuple(
            FloatTrial(precision=own.precision, images_per_s=rate) for own, rate in zip(floats, rates, strict=False)
        ),
        trials=trials,
        taken=taken,
        float_layers=() if variant is None else variant.float_layers,
        kernels={} if chosen is None else kernels_of(chosen.engine.compiled),
    )
    return None if variant is None else variant.graph, proof


def _variants(detector: Detector, graph: Any, samples: "_Samples", progress: Progress) -> list[_Variant]:
    """Quantise a graph at each level; levels with the same layers in INT8 as one before, or with none, are left out."""
    parts = FloatParts(detector)
    variants: list[_Variant] = []
    for level in LEVELS:
        progress.begin(f"quantising: {level}")
        own = quantise(graph, samples, len(samples), parts.nodes_in(graph, level))
        int8_layers, float_layers = layers_by_precision(own)
        if int8_layers and all(int8_layers != other.int8_layers for other in variants):
            variants.append(_Variant(level, own, int8_layers, float_layers))
    return variants


def rows_of_all_parts(num_rows: int, num_wanted: int) -> list[range]:
    """Return so many rows of a table in short ranges, one from each of its parts, which have the same size; or all."""
    num_wanted = min(num_wanted, num_rows)
    num_parts = min(num_wanted, max(_LEAST_PARTS, math.ceil(num_wanted / _CALIBRATED_TOGETHER)))
    ranges, start = [], 0
    for part in range(num_parts):
        ranges.append(range(start, start + num_wanted // num_parts + (part < num_wanted % num_parts)))
        start += num_rows // num_parts + (part < num_rows % num_parts)
    return ranges


class _Samples:
    """Inputs of the graph for calibration, made anew in each pass, because they are many times as large as pixels."""

    def __init__(self, engine: OpenVinoEngine, table: Table, num_images: int, progress: Progress) -> None:
        """Read images from all parts of a table, and resize them.

        Raises:
            UserError: None can be read.
        """
        self._engine = engine
        self._batches: list[EngineBatch] = []
        images = open_collection(table.uri, index_uri=None)
        chosen = rows_of_all_parts(table.num_rows, num_images)
        progress.begin("reading images to calibrate with", total=sum(map(len, chosen)))
        for rows in chosen:
            pictures = []
            for row in images.read(rows.start, rows.stop):
                try:
                    pictures += [] if row.data is None else [decode(row.data, max_pixels=DEFAULT_MAX_PIXELS)]
                except DecodeError:
                    continue
            self._batches += engine.prepare(pictures)
            progress.advance(len(pictures))
        if not self._batches:
            raise UserError(f"--calibration {table.uri} has no image that can be read")

    @property
    def num_images(self) -> int:
        """Number of images."""
        return sum(len(batch.places) for batch in self._batches)

    def __iter__(self) -> Iterator[GraphInputs]:
        return self._engine.graph_inputs(self._batches)

    def __len__(self) -> int:
        return sum(math.ceil(len(batch.places) / self._engine.images_per_run) for batch in self._batches)


def _rates(candidates: Sequence[_Compiled], images: Sequence[Image], progress: Progress) -> list[float]:
    """Return images per second of each candidate in its fastest turn; all take one in each round.

    Whatever else the machine does makes a turn slower, never faster.
    """
    seconds: list[list[float]] = [[] for _ in candidates]
    progress.begin("measuring the speed in turns", total=_ROUNDS * len(candidates), unit="trials")
    for _ in range(_ROUNDS):
        for candidate, own in zip(candidates, seconds, strict=True):
            prepared = candidate.engine.prepare(images)
            started = time.perf_counter()
            candidate.engine.predict(prepared)
            own.append(time.perf_counter() - started)
            progress.advance(1)
    return [len(images) / min(own) for own in seconds]


def _trials(candidates: Sequence[_Compiled], rates: Sequence[float], *, num_floats: int) -> tuple[Int8Trial, ...]:
    """Compare the speed of candidates with that of the faster float graph, whose rates come first."""
    fastest = max(rates[:num_floats])
    trials = []
    for candidate, own in zip(candidates, rates[num_floats:], strict=True):
        variant = candidate.variant
        assert variant is not None, "float graphs are no trials"
        trials.append(
            Int8Trial(
                level=variant.level,
                precision=candidate.precision,
                num_int8=len(variant.int8_layers),
                num_float=len(variant.float_layers),
                images_per_s=own,
                speedup=own / fastest,
            )
        )
    return tuple(trials)


class _Judge:
    """AP of candidates on the images of a table, beside that of the float graph.

    Attributes:
        num_images: Number of readable images.
        ap_float: AP of the float graph.
    """

    def __init__(
        self, detector: Detector, before: _Compiled, config: ExportOpenvinoConfig, truth: Table, progress: Progress
    ) -> None:
        """Measure the float graph.

        Raises:
            UserError: The table is damaged, or has no image or class that the model can be measured on; or AP is 0.
        """
        self._categories, self._config, self._truth, self._progress = detector.categories, config, truth, progress
        names = [category.name for category in detector.categories]
        self._index_of = class_indices(truth, names, config.checkpoint)
        self._before, seconds = self._accumulated(before)
        self.num_images = len(self._before.matches().image_ids)
        self.ap_float = self._before.result().values["AP"] or 0.0
        if not self.num_images:
            raise UserError(f"--truth {truth.uri} has no image that can be read")
        if not self.ap_float:
            raise UserError(
                f"--truth {truth.uri}: the AP of {config.checkpoint} is 0, so that a loss cannot be measured; use "
                "labelled images of the kind that it was trained on"
            )
        self._images_per_s = self.num_images / seconds

    def judged(
        self, candidates: Sequence[_Compiled], trials: Sequence[Int8Trial]
    ) -> tuple[tuple[Int8Trial, ...], int | None]:
        """Measure trials in the order of speed until one passes; return all of them, and its index."""
        own = list(trials)
        for place in sorted(range(len(own)), key=lambda place: -own[place].speedup):
            if own[place].speedup < MIN_SPEEDUP:
                break
            own[place] = self._measured(candidates[place], own[place])
            if own[place].passes(self._config.max_ap_drop):
                return tuple(own), place
        return tuple(own), None

    def timed_images(self, step: int) -> list[Image]:
        """Return as many images as a turn takes, a multiple of `step`; few are repeated."""
        pictures = [image.pixels for image in next(labelled_images(self._truth, self._index_of))]
        num_images = max(1, min(round(self._images_per_s * _SECONDS_PER_TURN), _MOST_TIMED_IMAGES) // step) * step
        return [pictures[number % len(pictures)] for number in range(num_images)]

    def _measured(self, candidate: _Compiled, trial: Int8Trial) -> Int8Trial:
        """Measure the AP of a candidate, and its difference from that of the float graph."""
        after, _ = self._accumulated(candidate)
        numbers = paired_differences(
            self._before.matches(),
            after.matches(),
            num_resamples=self._config.bootstrap,
            seed=self._config.seed,
            progress=self._progress,
        )
        difference = numbers.difference.overall["AP"]
        return dataclasses.replace(
            trial,
            ap=after.result().values["AP"],
            difference=difference.value,
            low=difference.low,
            high=difference.high,
        )

    def _accumulated(self, candidate: _Compiled) -> tuple[CocoAccumulator, float]:
        """Run a candidate on all images; return what it found, and the seconds that the engine took."""
        accumulator, seconds = CocoAccumulator(self._categories), 0.0
        name = "float" if candidate.variant is None else f"INT8, {candidate.variant.level}"
        self._progress.begin(f"measuring AP: {name}, {candidate.precision}", total=self._truth.num_rows)
        for batch in labelled_images(self._truth, self._index_of):
            prepared = candidate.engine.prepare([image.pixels for image in batch])
            started = time.perf_counter()
            found = candidate.engine.predict(prepared)
            seconds += time.perf_counter() - started
            for image, own in zip(batch, found, strict=True):
                detections = ImageDetections(own.boxes_xywh, own.scores, own.categories)
                accumulator.add(image.image_id, image.truth, detections)
            self._progress.advance(len(batch))
        return accumulator, seconds

"""The report of a scoring job: seconds per stage, memory, errors, cost → OUT/.job.json and lines for the terminal.

`JobStats` adds up the `FileStats` of the written files, in any order, and builds a `JobReport`.
"""

import math
import re
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raydet.cluster.stopwatch import STAGES, STAGES_OF_KIND, FileStats
from raydet.cluster.timeline import Timeline
from raydet.common.console import aligned, counted, shown
from raydet.common.errors import one_line

if TYPE_CHECKING:
    from raydet.cluster.job_record import JobRecord

OTHER = "other reasons"
_MOST_REASONS = 20
_MOST_REASONS_HELD = 1000
_MOST_REASONS_SHOWN = 3
_MOST_REASON_LENGTH = 100
_BOTTLENECK = 0.8
"""A stage busy for at least this share of the time is saturated."""
_BUSY = 0.5
"""A stage busy for less than this share of the time does not limit the others."""
_DETAILS = (
    (re.compile(r"""'[^']*'|"[^"]*"|`[^`]*`"""), "…"),
    (re.compile(r"(?<!\S)(?=[/\\]|\S*[.:\d])\S*[/\\]\S+?(?=[,;:]?(?:\s|$))"), "…"),
    (re.compile(r"\b0x[0-9a-fA-F]+\b|(?<![A-Za-z0-9])\d[\d,.]*(?<![,.])"), "N"),
)
_ADVICE = {
    "read": "keep the images near the cluster and in few large files (an images table or tar files), or add nodes",
    "decode": "give decoding more CPUs (lower --cpus-per-worker, or add CPU nodes), or try --reduced-decode",
    "prepare": "give decoding more CPUs (lower --cpus-per-worker, or add CPU nodes), store smaller images, or try "
    "--resize-on device with GPUs",
    "model": "add workers or nodes (--num-workers), or try another --engine, --precision or --batch-size",
    "write": "write to faster storage, or write less (--score-threshold, --top-k)",
}


@dataclass(frozen=True)
class StageSeconds:
    """The work of a stage in all its processes.

    Attributes:
        num_processes: Threads that worked on it, in all processes.
        busy_share: Mean busy share of its threads in the time after start-up.
        images_per_s_of_one: Images per busy second of one thread.
        images_per_s_at_most: The same of all threads if none ever waited: an upper bound, since they share cores.
    """

    busy_s: float
    num_processes: int
    busy_share: float | None
    images_per_s_of_one: float | None
    images_per_s_at_most: float | None


@dataclass(frozen=True, kw_only=True)
class JobReport:
    """The content of a scoring job's `.job.json`. Self-explanatory attributes are not listed.

    Attributes:
        errors: Number of unreadable images by reason, the most frequent first.
        error: Reason for a premature end of the run; None if it finished.
        wall_s: Seconds since the run started.
        startup_s: Seconds until the first model started on its first images; stage rates and `busy_share` refer to
            the time after it.
        model_busy_share: `busy_share` of the stage `model`.
        timeline: See `Timeline.to_dict`.
        peak_mb: Sum of the processes' peak memory, in units of 2²⁰ bytes. A process that decodes and writes counts once
            here, and once per kind in `peak_mb_by_kind`.
        peak_mb_of_one: Highest peak memory of a single process.
        job: Ids, nodes and versions of the job.
        earlier_runs: Runs that this one resumes, oldest first.
        bottleneck: The stage that limits the run, or `startup`; None if no stage was busy enough.
    """

    num_images: int
    num_detections: int
    num_errors: int
    errors: dict[str, int]
    error: str | None
    wall_s: float
    startup_s: float
    images_per_s: float | None
    images_per_s_after_startup: float | None
    num_nodes: int
    num_model_workers: int
    model_busy_share: float | None
    stages: dict[str, StageSeconds]
    timeline: dict[str, Any]
    peak_mb: float
    peak_mb_by_kind: dict[str, float]
    peak_mb_of_one: float
    num_processes: int
    price_per_node_hour: float | None
    cost_per_million_images: float | None
    config_hash: str | None
    job: "JobRecord"
    versions: dict[str, str]
    earlier_runs: list[dict[str, Any]]
    bottleneck: str | None

    def lines(self) -> list[str]:
        """Return a short table for the terminal; the last line names the bottleneck and a remedy."""
        time_spent = f"{duration_text(self.wall_s)}, including {duration_text(self.startup_s)} start-up"
        rates = f"{rate_text(self.images_per_s_after_startup)} images/s after start-up, {rate_text(self.images_per_s)}"
        lines = [f"{self.num_images:,} images in {time_spent}: {rates} overall"]
        if self.earlier_runs:
            num_images = self.num_images + sum(run["num_images"] for run in self.earlier_runs)
            wall_s = self.wall_s + sum(run["wall_s"] for run in self.earlier_runs)
            before = counted(len(self.earlier_runs), "earlier run")
            lines.append(f"including {before}: {num_images:,} images in {duration_text(wall_s)}")
        if self.num_errors:
            reasons = [f"{count:,} {reason}" for reason, count in self.errors.items()][:_MOST_REASONS_SHOWN]
            rest = sum([*self.errors.values()][_MOST_REASONS_SHOWN:])
            reasons += [f"{rest:,} others"] if rest else []
            lines.append(f"{self.num_errors:,} unreadable: {'; '.join(reasons)}")
        lines += _stage_lines(self.stages)
        by_kind = ", ".join(f"{kind} {_size(size)}" for kind, size in self.peak_mb_by_kind.items())
        memory = f"memory: at most {_size(self.peak_mb)} in {self.num_processes} processes"
        lines.append(f"{memory} ({by_kind})" if by_kind else memory)
        if self.cost_per_million_images is not None:
            price = f"{counted(self.num_nodes, 'node')} at {self.price_per_node_hour:g} per hour"
            lines.append(f"cost: {self.cost_per_million_images:,.2f} per million images ({price})")
        return [*lines, self._advice()]

    def _advice(self) -> str:
        """Return one sentence that names the bottleneck and a remedy."""
        if not self.num_images:
            return "no image was scored in this run"
        if self.bottleneck == "startup":
            return "start-up took more than half of the time: score more images per run"
        model_share = self.model_busy_share or 0.0
        if self.bottleneck is None:
            return (
                f"no clear bottleneck: the model was busy {model_share:.0%} of the time and no stage more than "
                f"{_BUSY:.0%}; try a larger --batch-size, or measure a longer run"
            )
        share = self.stages[self.bottleneck].busy_share or 0.0
        busy = f"is the bottleneck, busy {share:.0%} of the time"
        if self.bottleneck == "model":
            return f"the model {busy}: {_ADVICE['model']}"
        return f"{self.bottleneck} {busy} (model: {model_share:.0%}): {_ADVICE[self.bottleneck]}"


def error_kind(reason: str) -> str:
    """Generalise the reason for one file's error: quoted text and paths become `…`, numbers `N`."""
    kind = one_line(reason)
    for pattern, replacement in _DETAILS:
        kind = pattern.sub(replacement, kind)
    return kind if len(kind) <= _MOST_REASON_LENGTH else kind[: _MOST_REASON_LENGTH - 1].rstrip() + "…"


class JobStats:
    """Running sums over the files that a run has written, such as `num_images`; create one when the run starts."""

    def __init__(self) -> None:
        self._started_unix_s = time.time()
        self._first_batch_unix_s = math.inf
        self.num_images = self._num_detections = 0
        self._errors: Counter[str] = Counter()
        self._busy_s = dict.fromkeys(STAGES, 0.0)
        self._threads: dict[str, set[tuple[str, int, int]]] = {stage: set() for stage in STAGES}
        self._peak_mb: dict[tuple[str, int], dict[str, float]] = {}
        self._timeline = Timeline(self._started_unix_s)

    def add(self, stats: FileStats) -> None:
        """Add a written file."""
        self.num_images += stats.num_images
        self._num_detections += stats.num_detections
        for reason, count in Counter(map(error_kind, stats.errors)).most_common():
            is_held = reason in self._errors or len(self._errors) < _MOST_REASONS_HELD
            self._errors[reason if is_held else OTHER] += count
        num_laps = Counter(item.kind for item in stats.processes)
        for item in stats.processes:
            process = (item.node, item.pid)
            # Blocks of a file differ little in their number of images.
            num_images = stats.num_images / num_laps[item.kind]
            for stage in STAGES_OF_KIND[item.kind]:
                self._timeline.add(stage, item.ended_unix_s, num_images)
            for stage, seconds in item.seconds.items():
                self._busy_s[stage] += seconds
                self._threads[stage].add((*process, item.thread))
            peaks = self._peak_mb.setdefault(process, {})
            peaks[item.kind] = max(peaks.get(item.kind, 0.0), item.resident_mb)
            if item.kind == "model":
                began = item.ended_unix_s - sum(item.seconds.values())
                self._first_batch_unix_s = min(self._first_batch_unix_s, began)

    def finish(
        self,
        *,
        wall_s: float,
        num_model_workers: int,
        job: "JobRecord",
        price_per_node_hour: float | None = None,
        config_hash: str | None = None,
        earlier: Mapping[str, Any] | None = None,
        error: str | None = None,
    ) -> JobReport:
        """Build the report so far; may be called repeatedly, and after a failure.

        The cost covers all nodes of the job, and this run's images and wall time, in any currency. `earlier` is the
        content of OUT/.job.json at the start, if the run resumes an earlier one.
        """
        # The clocks of machines differ slightly.
        startup_s = min(max(self._first_batch_unix_s - self._started_unix_s, 0.0), wall_s)
        running_s = wall_s - startup_s
        stages = {stage: self._stage(stage, running_s, num_model_workers) for stage in STAGES}
        cost = None
        if price_per_node_hour is not None and self.num_images:
            cost = price_per_node_hour * job.num_nodes * wall_s / 3600 / self.num_images * 1e6
        peaks_mb = [max(peaks.values()) for peaks in self._peak_mb.values()]
        by_kind: dict[str, float] = {}
        for kind, peak_mb in (item for peaks in self._peak_mb.values() for item in peaks.items()):
            by_kind[kind] = by_kind.get(kind, 0.0) + peak_mb
        return JobReport(
            num_images=self.num_images,
            num_detections=self._num_detections,
            num_errors=self._errors.total(),
            errors=_most_common(self._errors),
            error=error,
            wall_s=wall_s,
            startup_s=startup_s,
            images_per_s=_ratio(self.num_images, wall_s),
            images_per_s_after_startup=_ratio(self.num_images, running_s),
            num_nodes=job.num_nodes,
            num_model_workers=num_model_workers,
            model_busy_share=stages["model"].busy_share,
            stages=stages,
            timeline=self._timeline.to_dict(),
            peak_mb=sum(peaks_mb),
            peak_mb_by_kind=dict(sorted(by_kind.items())),
            peak_mb_of_one=max(peaks_mb, default=0.0),
            num_processes=len(peaks_mb),
            price_per_node_hour=price_per_node_hour,
            cost_per_million_images=cost,
            config_hash=config_hash,
            job=job,
            versions=job.versions,
            earlier_runs=_earlier_runs(earlier),
            bottleneck=_bottleneck(self.num_images, startup_s, wall_s, stages),
        )

    def _stage(self, stage: str, running_s: float, num_model_workers: int) -> StageSeconds:
        busy_s, threads = self._busy_s[stage], self._threads[stage]
        num_processes = num_model_workers if stage == "model" else len(threads)
        rate, busy_share = _ratio(self.num_images, busy_s), _ratio(busy_s, running_s * num_processes)
        return StageSeconds(busy_s, num_processes, busy_share, rate, None if rate is None else rate * num_processes)


def _ratio(numerator: float, denominator: float) -> float | None:
    return numerator / denominator if denominator > 0 else None


def _most_common(errors: Counter[str]) -> dict[str, int]:
    """Return the most frequent reasons in descending order, with all others as one."""
    ordered = sorted(errors.items(), key=lambda item: (item[0] == OTHER, -item[1], item[0]))
    kept = dict(ordered[:_MOST_REASONS])
    rest = sum(count for _, count in ordered[_MOST_REASONS:])
    return {**kept, OTHER: kept.get(OTHER, 0) + rest} if rest else kept


def _earlier_runs(earlier: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """List the runs before this one, oldest first; a file that raydet did not write holds none."""
    if not isinstance(earlier, Mapping):
        return []
    names = ("num_images", "num_detections", "num_errors", "wall_s", "num_nodes", "num_model_workers", "error", "job")
    before = earlier.get("earlier_runs")
    runs = [*(before if isinstance(before, list) else []), {name: earlier.get(name) for name in names}]
    return [run for run in runs if isinstance(run, dict) and _has_numbers(run)]


def _has_numbers(run: Mapping[str, Any]) -> bool:
    return all(isinstance(run.get(name), int | float) for name in ("num_images", "wall_s"))


def _bottleneck(num_images: int, startup_s: float, wall_s: float, stages: Mapping[str, StageSeconds]) -> str | None:
    if num_images and startup_s > wall_s / 2:
        return "startup"
    shares = {stage: seconds.busy_share or 0.0 for stage, seconds in stages.items()}
    if shares["model"] >= _BOTTLENECK:
        return "model"
    busiest = max(STAGES, key=lambda stage: shares[stage])
    return busiest if shares[busiest] >= _BUSY else None


def _stage_lines(stages: Mapping[str, StageSeconds]) -> list[str]:
    rows = [("stage", "busy", "seconds", "threads", "images/s of one", "of all, at most")]
    rows += [
        (
            stage,
            shown(seconds.busy_share, ".0%"),
            f"{seconds.busy_s:,.1f}",
            str(seconds.num_processes),
            rate_text(seconds.images_per_s_of_one),
            rate_text(seconds.images_per_s_at_most),
        )
        for stage, seconds in stages.items()
    ]
    return aligned(rows)


def rate_text(images_per_s: float | None) -> str:
    """Format images per second with three significant digits, or as an integer from 100; None becomes a dash."""
    return shown(images_per_s, ",.0f" if images_per_s is not None and images_per_s >= 100 else ".3g")


def _size(megabytes: float) -> str:
    return f"{megabytes / 1024:.1f} GB" if megabytes >= 1000 else f"{megabytes:.0f} MB"


def duration_text(seconds: float) -> str:
    """Format seconds for the terminal, such as "3 min 20 s" or "2 h 5 min"."""
    if seconds < 99.95:
        return f"{seconds:.1f} s"
    minutes, short = round(seconds / 60), f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 100 else short

"""What a scoring run took: seconds of every stage, memory, errors, cost → OUT/job.json and a table for the terminal.

Each written file brings its own `FileStats`, `JobStats` adds them up, whatever their order.
"""

import importlib.metadata
import platform
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from raydet.cluster.timeline import Timeline
from raydet.common.errors import one_line

JOB_FILE = "job.json"
"""In the folder of a job's output."""
STAGES = ("read", "decode", "prepare", "model", "write")
"""What happens to an image, in this order; `prepare` (resizing) and `model` are in the processes of kind `model`."""

_LAST_STAGE_OF_KIND = {"reader": "read", "decoder": "decode", "model": "model", "writer": "write"}
OTHER = "other reasons"
_MOST_REASONS = 20
_MOST_REASONS_HELD = 1000
_MOST_REASONS_SHOWN = 3
_MOST_REASON_LENGTH = 100
_BOTTLENECK = 0.8
"""A stage that is busy for this share of the time or more has no room left."""
_BUSY = 0.5
"""A stage that is busy for less than this share does not hold up the others."""
_DETAILS = (
    (re.compile(r"""'[^']*'|"[^"]*"|`[^`]*`"""), "…"),
    (re.compile(r"(?<!\S)(?=[/\\]|\S*[.:\d])\S*[/\\]\S+?(?=[,;:]?(?:\s|$))"), "…"),
    (re.compile(r"\b0x[0-9a-fA-F]+\b|(?<![A-Za-z0-9])\d[\d,.]*(?<![,.])"), "N"),
)
_PACKAGES = ("raydet", "ray", "torch", "transformers", "openvino", "onnxruntime", "pyarrow", "numpy", "pillow")
_ADVICE = {
    "read": "keep the images near the cluster and in few large files (an images table or tar files), or add nodes",
    "decode": "give decoding more CPUs (lower --cpus-per-worker, or add CPU nodes), or try --reduced-decode",
    "prepare": "use more workers (--num-workers), or store smaller images",
    "model": "add workers or nodes (--num-workers), or try another --engine, --precision or --batch-size",
    "write": "write to faster storage, or write less (--score-threshold, --top-k)",
}


@dataclass(frozen=True, kw_only=True)
class ProcessStats:
    """What one process did for some images of a file.

    Attributes:
        node: The machine.
        pid: The process on it.
        kind: What it does: reader, decoder, model or writer.
        seconds: Busy with these images, by stage (see `STAGES`).
        resident_mb: Its memory then, 2²⁰ bytes, best without what it shares with others.
        ended_unix_s: When it was done with them.
    """

    node: str
    pid: int
    kind: str
    seconds: Mapping[str, float]
    resident_mb: float
    ended_unix_s: float = field(default_factory=time.time)


@dataclass(frozen=True, kw_only=True)
class FileStats:
    """What became of the images of one written file, and what it took.

    Attributes:
        num_images: Rows of the file.
        num_detections: In all its rows together.
        errors: Why images could not be read, a reason for each of them.
        processes: Of all processes that worked on them; one may stand here many times.
    """

    num_images: int
    num_detections: int
    errors: Sequence[str]
    processes: Sequence[ProcessStats]

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """Reads back `to_dict`."""
        return cls(**{**content, "processes": [ProcessStats(**item) for item in content["processes"]]})


def error_kind(reason: str) -> str:
    """A reason without what is of one file alone: quoted text and paths become `…`, numbers `N`."""
    kind = one_line(reason)
    for pattern, replacement in _DETAILS:
        kind = pattern.sub(replacement, kind)
    return kind if len(kind) <= _MOST_REASON_LENGTH else kind[: _MOST_REASON_LENGTH - 1].rstrip() + "…"


class JobStats:
    """The sums over the files that a run has written; make one when the run starts."""

    def __init__(self) -> None:
        self._started_unix_s = time.time()
        self._first_batch_unix_s: float | None = None
        self._num_images = self._num_detections = 0
        self._errors: Counter[str] = Counter()
        self._busy_s = dict.fromkeys(STAGES, 0.0)
        self._processes: dict[str, set[tuple[str, int]]] = {stage: set() for stage in STAGES}
        self._peak_mb: dict[tuple[str, int], dict[str, float]] = {}
        self._timeline = Timeline(self._started_unix_s)

    def add(self, stats: FileStats) -> None:
        """Takes in a written file."""
        self._num_images += stats.num_images
        self._num_detections += stats.num_detections
        for reason, count in Counter(map(error_kind, stats.errors)).most_common():
            is_held = reason in self._errors or len(self._errors) < _MOST_REASONS_HELD
            self._errors[reason if is_held else OTHER] += count
        num_laps = Counter(item.kind for item in stats.processes)
        for item in stats.processes:
            process = (item.node, item.pid)
            # The parts of a file have the same number of images, but for the last.
            num_images = stats.num_images / num_laps[item.kind]
            self._timeline.add(_LAST_STAGE_OF_KIND[item.kind], item.ended_unix_s, num_images)
            for stage, seconds in item.seconds.items():
                self._busy_s[stage] += seconds
                self._processes[stage].add(process)
            peaks = self._peak_mb.setdefault(process, {})
            peaks[item.kind] = max(peaks.get(item.kind, 0.0), item.resident_mb)
            if item.kind == "model":
                began = item.ended_unix_s - sum(item.seconds.values())
                first = self._first_batch_unix_s
                self._first_batch_unix_s = began if first is None else min(began, first)

    def finish(
        self,
        *,
        wall_s: float,
        num_nodes: int,
        num_model_workers: int,
        price_per_node_hour: float | None = None,
        config_hash: str | None = None,
        earlier: Mapping[str, Any] | None = None,
        error: str | None = None,
        job: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The report so far, for OUT/job.json; may be called more than once, and after a failure.

        Start-up is the time until the first model took up its first images; rates of stages and the model's
        `busy_share` refer to the time after it. A stage's `images_per_s_of_one` is images per second that one of its
        processes was busy, and `images_per_s_at_most` that of all its processes together, if they never waited.
        Ray may let many processes take turns, so that the latter is an upper bound; the cores they share are another.
        `timeline` has, by stage, the images that it was done with in each span of `span_s` seconds since the start.
        `peak_mb` adds up the highest memory of every process, wherever in the run each had it.

        Args:
            wall_s: Seconds since the run started.
            num_nodes: That the run had, all paid for.
            num_model_workers: Copies of the model.
            price_per_node_hour: In any currency; costs are in the same one, for this run's images and all its time.
            config_hash: What `raydet.config.config_hash` says of the run.
            earlier: The report that stood in OUT/job.json when the run started, if it goes on with that run.
            error: Why the run ended before its work was done.
            job: Where it ran; see `raydet.cluster.job_record.job_record`.
        """
        startup_s = wall_s
        if self._first_batch_unix_s is not None:
            # Clocks of machines differ a little.
            startup_s = min(max(self._first_batch_unix_s - self._started_unix_s, 0.0), wall_s)
        running_s = wall_s - startup_s
        stages = {stage: self._stage(stage, running_s, num_model_workers) for stage in STAGES}
        cost = None
        if price_per_node_hour is not None and self._num_images:
            cost = price_per_node_hour * num_nodes * wall_s / 3600 / self._num_images * 1e6
        report: dict[str, Any] = {
            "num_images": self._num_images,
            "num_detections": self._num_detections,
            "num_errors": self._errors.total(),
            "errors": _most_common(self._errors),
            "error": error,
            "wall_s": wall_s,
            "startup_s": startup_s,
            "images_per_s": _ratio(self._num_images, wall_s),
            "images_per_s_after_startup": _ratio(self._num_images, running_s),
            "num_nodes": num_nodes,
            "num_model_workers": num_model_workers,
            "model_busy_share": stages["model"]["busy_share"],
            "stages": stages,
            "timeline": self._timeline.to_dict(),
            **self._memory(),
            "price_per_node_hour": price_per_node_hour,
            "cost_per_million_images": cost,
            "config_hash": config_hash,
            "job": job,
            "versions": versions(),
            "earlier_runs": _earlier_runs(earlier),
        }
        report["bottleneck"] = _bottleneck(report)
        return report

    def _stage(self, stage: str, running_s: float, num_model_workers: int) -> dict[str, Any]:
        busy_s = self._busy_s[stage]
        is_in_model = stage in ("prepare", "model")
        num_processes = num_model_workers if is_in_model else len(self._processes[stage])
        rate = _ratio(self._num_images, busy_s)
        return {
            "busy_s": busy_s,
            "num_processes": num_processes,
            "busy_share": _ratio(busy_s, running_s * num_processes),
            "images_per_s_of_one": rate,
            "images_per_s_at_most": None if rate is None else rate * num_processes,
        }

    def _memory(self) -> dict[str, Any]:
        by_kind: dict[str, float] = {}
        for peaks in self._peak_mb.values():
            for kind, peak_mb in peaks.items():
                by_kind[kind] = by_kind.get(kind, 0.0) + peak_mb
        return {
            # A process that reads and decodes counts once here, and with each of its kinds below.
            "peak_mb": sum(max(peaks.values()) for peaks in self._peak_mb.values()),
            "peak_mb_by_kind": dict(sorted(by_kind.items())),
            "peak_mb_of_one": max((max(peaks.values()) for peaks in self._peak_mb.values()), default=0.0),
            "num_processes": len(self._peak_mb),
        }

    @staticmethod
    def lines(report: Mapping[str, Any]) -> list[str]:
        """A report as a short table for the terminal, what matters most last: where the time went and what to do."""
        time_spent = f"{_duration(report['wall_s'])}, start-up {_duration(report['startup_s'])} of it"
        rates = (rate_text(report[name]) for name in ("images_per_s_after_startup", "images_per_s"))
        text = "{:,} images in {}: {} images/s after start-up, {} over all"
        lines = [text.format(report["num_images"], time_spent, *rates)]
        runs = report["earlier_runs"]
        if runs:
            num_images = report["num_images"] + sum(run["num_images"] for run in runs)
            wall_s = report["wall_s"] + sum(run["wall_s"] for run in runs)
            before = "an earlier run" if len(runs) == 1 else f"{len(runs)} earlier runs"
            lines.append(f"with {before}: {num_images:,} images in {_duration(wall_s)}")
        if report["num_errors"]:
            lines.append(_error_line(report))
        lines += _stage_lines(report["stages"])
        by_kind = ", ".join(f"{kind} {_size(size)}" for kind, size in report["peak_mb_by_kind"].items())
        memory = f"memory: at most {_size(report['peak_mb'])} in {report['num_processes']} processes"
        lines.append(f"{memory} ({by_kind})" if by_kind else memory)
        if report["cost_per_million_images"] is not None:
            nodes = "1 node" if report["num_nodes"] == 1 else f"{report['num_nodes']} nodes"
            price = f"{nodes} at {report['price_per_node_hour']:g} an hour"
            lines.append(f"cost: {report['cost_per_million_images']:,.2f} per million images ({price})")
        return [*lines, _advice(report)]


def _ratio(numerator: float, denominator: float) -> float | None:
    return numerator / denominator if denominator > 0 else None


def _most_common(errors: Counter[str]) -> dict[str, int]:
    """The most frequent reasons, by falling number, and all others as one."""
    ordered = sorted(errors.items(), key=lambda item: (item[0] == OTHER, -item[1], item[0]))
    kept = dict(ordered[:_MOST_REASONS])
    rest = sum(count for _, count in ordered[_MOST_REASONS:])
    return {**kept, OTHER: kept.get(OTHER, 0) + rest} if rest else kept


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that decide what comes out, of those that are installed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _earlier_runs(earlier: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The runs before this one, the first first."""
    if earlier is None:
        return []
    names = ("num_images", "num_detections", "num_errors", "wall_s", "num_nodes", "num_model_workers", "error", "job")
    return [*earlier.get("earlier_runs", []), {name: earlier.get(name) for name in names}]


def _bottleneck(report: Mapping[str, Any]) -> str | None:
    """The stage that the others waited for, or `startup`; None where nothing was busy enough to be it."""
    if report["num_images"] and report["startup_s"] > report["wall_s"] / 2:
        return "startup"
    shares = {stage: numbers["busy_share"] or 0.0 for stage, numbers in report["stages"].items()}
    if shares["model"] >= _BOTTLENECK:
        return "model"
    busiest = max(STAGES, key=lambda stage: shares[stage])
    return busiest if shares[busiest] >= _BUSY else None


def _advice(report: Mapping[str, Any]) -> str:
    """One sentence: what held the run up, and what to change."""
    stage, stages = report["bottleneck"], report["stages"]
    if not report["num_images"]:
        return "no image was scored in this run"
    if stage == "startup":
        return "start-up took more than half of the time: more images in one run make better use of it"
    model_share = stages["model"]["busy_share"] or 0.0
    if stage is None:
        return (
            f"no bottleneck stands out: the model was busy {model_share:.0%} of the time and no stage more than "
            f"{_BUSY:.0%}; a larger --batch-size hands on more at once, and a longer run tells more"
        )
    if stage == "model":
        return f"the model is the bottleneck, busy {model_share:.0%} of the time: {_ADVICE[stage]}"
    return (
        f"{stage} is the bottleneck, busy {stages[stage]['busy_share']:.0%} of the time while the model was "
        f"{model_share:.0%}: {_ADVICE[stage]}"
    )


def _error_line(report: Mapping[str, Any]) -> str:
    reasons = list(report["errors"].items())
    shown = [f"{count:,} {reason}" for reason, count in reasons[:_MOST_REASONS_SHOWN]]
    rest = sum(count for _, count in reasons[_MOST_REASONS_SHOWN:])
    return f"{report['num_errors']:,} could not be read: {'; '.join([*shown, *([f'{rest:,} others'] if rest else [])])}"


def _stage_lines(stages: Mapping[str, Mapping[str, Any]]) -> list[str]:
    rows = [("stage", "busy", "seconds", "processes", "images/s of one", "of all at most")]
    for stage, numbers in stages.items():
        share = numbers["busy_share"]
        rows.append(
            (
                stage,
                "–" if share is None else f"{share:.0%}",
                f"{numbers['busy_s']:,.1f}",
                str(numbers["num_processes"]),
                rate_text(numbers["images_per_s_of_one"]),
                rate_text(numbers["images_per_s_at_most"]),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))])
        for first, *rest in rows
    ]


def rate_text(images_per_s: float | None) -> str:
    """Images per second with three digits or, above 100, whole; a dash where there are none."""
    if images_per_s is None:
        return "–"
    return f"{images_per_s:,.0f}" if images_per_s >= 100 else f"{images_per_s:.3g}"


def _size(megabytes: float) -> str:
    return f"{megabytes / 1024:.1f} GB" if megabytes >= 1000 else f"{megabytes:.0f} MB"


def _duration(seconds: float) -> str:
    if seconds < 99.95:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return (
        f"{minutes // 60} h {minutes % 60} min" if minutes >= 100 else f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
    )

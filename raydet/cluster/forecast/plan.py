"""`plan`: time, cost, bottleneck and balance of a larger run, estimated from a measured one.

    time = start and end + images ÷ rate (+ epochs × validation and checkpoints)
    rate = measured rate × the growth of the scarcer resource: workers for the model, CPUs for everything else

The growth of a resource is relative to its full use: workers that were busy half of the time can do twice the work.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from raydet.cluster.forecast.measured import MeasuredRun, read_run
from raydet.cluster.forecast.nodes import NodeGroup, groups_of_yaml, total_cpus, total_gpus, with_prices
from raydet.cluster.job_report import duration_text, rate_text
from raydet.common.console import aligned
from raydet.common.errors import UserError
from raydet.common.notebook.showing import Shown
from raydet.config import PlanConfig
from raydet.config.fields import with_options

_SHORT_S = 10.0
"""A shorter measurement may be off by more than a quarter."""
_UNUSED = 0.5
"""A run in which no resource was used for more than this share of the time was limited by none of them."""
_STAGES = {"read": "reading", "decode": "decoding", "prepare": "resizing", "model": "model", "write": "writing"}
_STAGES |= {"data": "waiting for images", "compute": "model", "communication": "exchange of gradients"}
_ADVICE = {
    "reading": "keep the images near the cluster and in few large files, or add CPU nodes",
    "decoding": "add CPU nodes, or store smaller images",
    "resizing": "add CPU nodes, or store smaller images",
    "reading and decoding": "add CPU nodes, or choose a lighter augmentation",
    "model": "add GPUs, or nodes if it runs on CPUs, or try another --precision, --engine or --batch-size",
    "writing": "write to faster storage, or write less (--score-threshold, --top-k)",
}


@dataclass(frozen=True, kw_only=True)
class PlanResult(Shown):
    """The forecast of a run.

    Attributes:
        groups: Nodes of the plan, with prices.
        num_images: Images over all epochs.
        images_per_s: Images per second after start-up.
        total_s: Seconds from start to end.
        cost: Cost of all nodes with a price for `total_s`; None without prices.
        bottleneck: The stage that limits the run; None if no stage was busy enough in the measured run.
        nodes_per_gpu_node: CPU nodes that keep one GPU node busy; None if unknown or if the plan lacks either.
        is_extrapolated: True if the workers or nodes of the plan are not those of the measured run.
    """

    config: PlanConfig
    measured: MeasuredRun
    groups: Sequence[NodeGroup]
    num_workers: int
    num_images: int
    images_per_s: float
    total_s: float
    cost: float | None
    bottleneck: str | None
    nodes_per_gpu_node: float | None
    is_extrapolated: bool

    json_properties: ClassVar = ("cpus_per_gpu", "notes")

    @property
    def cpus_per_gpu(self) -> float | None:
        """CPUs that read, decode and write for one GPU that never waits; None without a GPU or if unknown."""
        return self.measured.cpus_per_gpu

    def lines(self) -> list[str]:
        """Return a short table for the terminal."""
        measured, epochs = self.measured, self.num_images // self.config.images
        what = f"{measured.job} {self.config.images:,} images" + (f", {epochs} epochs" if epochs > 1 else "")
        rows = [
            ("", "measured", "planned"),
            ("images", f"{measured.num_images:,}", f"{self.num_images:,}"),
            ("workers", str(measured.num_workers), str(self.num_workers)),
            ("CPUs", f"{total_cpus(measured.groups):g}", f"{total_cpus(self.groups):g}"),
            ("GPUs", f"{total_gpus(measured.groups):g}", f"{total_gpus(self.groups):g}"),
            ("images/s", rate_text(measured.images_per_s), rate_text(self.images_per_s)),
        ]
        total_s = sum(measured.stage_s.values()) or 1.0
        stage_rows = [("stage", "ms per image", "share of work")]
        for name, seconds in measured.stage_s.items():
            stage_rows.append((_STAGES.get(name, name), f"{seconds * 1e3:,.2f}", f"{seconds / total_s:.0%}"))
        per_epoch = f" and {duration_text(measured.epoch_overhead_s)} per epoch for validation and checkpoints"
        overhead = duration_text(measured.overhead_s)
        lines = [
            f"{what} on {', '.join(group.describe() for group in self.groups)}",
            *(*aligned(rows), "", *aligned(stage_rows), ""),
            f"time: {duration_text(self.total_s)}, including {overhead} for start and end"
            + per_epoch * (measured.job == "train"),
        ]
        if self.cost is not None:
            lines.append(f"cost: {self.cost:,.2f}, {self.cost / self.num_images * 1e6:,.2f} per million images")
        lines += [self._bottleneck_line(), *self._balance_lines()]
        return lines + [f"note: {text}" for text in self.notes]

    def _bottleneck_line(self) -> str:
        if self.bottleneck is None:
            return (
                f"bottleneck: unknown; no stage was busy for more than {_UNUSED:.0%} of the measured run, so measure a "
                "longer run, or one with a larger --batch-size"
            )
        return f"bottleneck: {self.bottleneck}; {_ADVICE[self.bottleneck]}"

    def _balance_lines(self) -> list[str]:
        need = self.measured.cpus_per_gpu
        if need is None:
            return []
        have = total_cpus(self.groups) / self.num_workers
        text = f"balance: a GPU that never waits needs {need:,.1f} CPUs; this cluster has {have:,.1f} per worker"
        ratio = self.nodes_per_gpu_node
        return [text if ratio is None else f"{text}; each GPU node needs {ratio:.2g} CPU nodes"]

    @property
    def notes(self) -> list[str]:
        """Assumptions of the forecast, and what it does not cover."""
        measured = self.measured
        nodes = ", ".join(group.describe() for group in measured.groups)
        found = []
        if self.is_extrapolated:
            found.append(
                f"extrapolated from {measured.num_workers} worker{'s' * (measured.num_workers > 1)} on {nodes}, "
                "assuming that the model scales with workers, everything else scales with CPUs, and network and "
                "storage keep up"
            )
        if measured.measured_s < _SHORT_S:
            found.append(f"the rate was measured over only {measured.measured_s:.1f} s of work; measure a longer run")
        found += measured.notes
        if measured.job == "train":
            found.append("validation and checkpoints are assumed to take as long per epoch as in the measured run")
            if measured.cpus_busy is None:
                found.append("the model never waited for images, so how many CPUs per GPU are enough is unknown")
        found.append(
            "not included: the effect of other instance types, images, models or options than the measured ones; the "
            "time until nodes have started; spot interruptions; other jobs on the cluster"
        )
        unpaid = [group.name for group in self.groups if group.price_per_hour is None]
        if self.cost is not None:
            without = f", without {', '.join(unpaid)}" if unpaid else ""
            found.append(f"the cost covers all nodes from start to end{without}; storage and network are not counted")
        return found


@with_options(PlanConfig)
def plan(config: PlanConfig) -> PlanResult:
    """Estimate the time and cost of a run from a measured one. Starts nothing.

    Raises:
        UserError: The run has no measurements, the cluster file is invalid, or the run says nothing about the cluster.
    """
    measured = read_run(config.run)
    if config.epochs is not None and measured.job == "predict":
        raise UserError(f"--epochs is for training, but {config.run} is a run of `predict`")
    groups = with_prices(groups_of_yaml(config.cluster) if config.cluster else measured.groups, config.price or ())
    num_workers = _num_workers(config, measured, groups)
    growth, bottleneck = _growth(measured, groups, num_workers)
    epochs = 1 if measured.job == "predict" else config.epochs or measured.epochs
    num_images, rate = config.images * epochs, measured.images_per_s * growth
    total_s = measured.overhead_s + num_images / rate + epochs * measured.epoch_overhead_s
    prices = [group.num_nodes * group.price_per_hour for group in groups if group.price_per_hour is not None]
    return PlanResult(
        config=config,
        measured=measured,
        groups=groups,
        num_workers=num_workers,
        num_images=num_images,
        images_per_s=rate,
        total_s=total_s,
        cost=sum(prices) * total_s / 3600 if prices else None,
        bottleneck=bottleneck,
        nodes_per_gpu_node=_nodes_per_gpu_node(measured.cpus_per_gpu, groups),
        is_extrapolated=num_workers != measured.num_workers or _sizes(groups) != _sizes(measured.groups),
    )


def _num_workers(config: PlanConfig, measured: MeasuredRun, groups: Sequence[NodeGroup]) -> int:
    num_gpus = int(total_gpus(groups))
    if measured.use_gpu and not num_gpus:
        raise UserError(f"{config.run} was measured on GPUs, but the cluster has none; measure a run with --no-use-gpu")
    if not measured.use_gpu and num_gpus and config.cluster:
        raise UserError(
            f"{config.run} was measured without a GPU, which says nothing about the cluster's GPUs; measure a run on a "
            "node with one, such as `raydet predict --limit 2000`"
        )
    if measured.use_gpu:
        number = config.num_workers or (num_gpus if config.cluster else measured.num_workers)
        if number > num_gpus:
            raise UserError(f"--num-workers {number} requires {number} GPUs, but the cluster has {num_gpus}; lower it")
    else:
        scaled = measured.num_workers * total_cpus(groups) / total_cpus(measured.groups)
        number = config.num_workers or max(1, round(scaled))
    if measured.batch_size is not None and number > measured.batch_size:
        raise UserError(
            f"the batch of {measured.batch_size} images cannot keep {number} workers busy; lower --num-workers, or "
            "measure a run with a larger --batch-size"
        )
    return number


def _growth(measured: MeasuredRun, groups: Sequence[NodeGroup], num_workers: int) -> tuple[float, str | None]:
    """Return the rate of the plan relative to the measured one, and its bottleneck."""
    cpus = total_cpus(groups) / total_cpus(measured.groups)
    if measured.use_gpu:
        model = num_workers / measured.num_workers
    else:  # a worker's threads fill its share of the CPUs, but not more than its node
        model = _cpus_in_reach(groups, num_workers) / _cpus_in_reach(measured.groups, measured.num_workers)
    used = {"model": measured.model_busy, "CPUs": measured.cpus_busy or 0.0}
    room = {"model": model / max(used["model"], 1e-9), "CPUs": cpus / max(used["CPUs"], 1e-9)}
    limit = min(room, key=lambda name: room[name])
    reached = max(used.values())
    bottleneck = _heaviest_stage(measured) if limit == "CPUs" else "model"
    return reached * room[limit], bottleneck if reached >= _UNUSED else None


def _cpus_in_reach(groups: Sequence[NodeGroup], num_workers: int) -> float:
    return min(total_cpus(groups), num_workers * max(group.num_cpus for group in groups))


def _heaviest_stage(measured: MeasuredRun) -> str:
    """Return the stage that takes most of the CPUs; the model's seconds count for all threads of its worker."""
    if measured.job == "train":
        return "reading and decoding"
    seconds: Mapping[str, float] = measured.stage_s
    if measured.use_gpu:
        seconds = {name: value for name, value in seconds.items() if name != "model"}
    else:
        threads = max(1.0, total_cpus(measured.groups) / measured.num_workers)
        seconds = {**seconds, "model": seconds["model"] * threads}
    return _STAGES[max(seconds, key=lambda name: seconds[name])]


def _nodes_per_gpu_node(cpus_per_gpu: float | None, groups: Sequence[NodeGroup]) -> float | None:
    of_gpu = [group for group in groups if group.num_gpus]
    of_cpu = [group for group in groups if group.num_cpus and not group.num_gpus]
    if cpus_per_gpu is None or not of_gpu or not of_cpu:
        return None
    missing = max(0.0, cpus_per_gpu * total_gpus(of_gpu) - total_cpus(of_gpu)) / sum(one.num_nodes for one in of_gpu)
    return missing / (total_cpus(of_cpu) / sum(one.num_nodes for one in of_cpu))


def _sizes(groups: Sequence[NodeGroup]) -> list[tuple[float, float, int]]:
    return sorted((group.num_cpus, group.num_gpus, group.num_nodes) for group in groups if group.num_cpus)

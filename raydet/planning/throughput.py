"""The throughput of a cluster, from the cost of an image in each stage and the available resources.

The model is as simple as can be, a line of machines without queues that matter:

    images/s = min( CPUs      : c / Σ s               which all stages share
                    threads   : c / (T w(T) + Σ' s)   which hold their CPUs, over all stages but the model
                    workers   : W / w(T)              copies of the model with T threads, or on a GPU each
                    decoding  : d / s_d               decoding tasks, which fit beside what is reserved for the workers
                    GPU nodes : g / Σ" s              over what only their own CPUs can do: resizing, feeding the GPU
                    reading   : r / q )               r reading tasks that wait q seconds for the storage
    seconds = start-up + max(0, W / c - W' / c') u + images / (images/s)

with s a stage's CPU seconds an image, c all CPUs and g those of GPU nodes. w(T) = a + b / T is Amdahl's law (1967)
through the measured w(1) and w(all CPUs of the measured machine). The threads of a worker hold their CPUs also where
they wait, for each other or for another worker. W workers that train take B / W · w(T) + h + 2 (W - 1) / W · p / n
seconds for a step over a batch of B images, of which an image's w is the part W / B. In h, which is measured with as
many workers as the machine has CPUs and goes with (W - 1) / W as well, they wait for the slowest and pass gradients
within a node. The last part, on several nodes, is a ring's all-reduce of p bytes of gradients at n bytes a second
(Patarasuk and Yuan 2009), as if none of it were hidden. To bring up a copy of the model takes u CPU seconds; start-up
is that of a run of W' copies on the c' CPUs of the measured machine.

A real run on the measured machine, set against the formula for that machine, gives the share of it that is reached,
by which the limits are multiplied.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from raydet.common.errors import UserError

PROBE_VERSION = 3
RAY = "ray"
"""The stage for the remaining time of the measured run: Ray's processes and transfers."""


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """Cost of an image in a stage.

    Attributes:
        cpu_s: CPU seconds, of all threads.
        wall_s: Seconds that one process is at it.
    """

    cpu_s: float
    wall_s: float


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Measurements on one machine.

    Attributes:
        job: predict or train.
        model: What was run, in words.
        device: That the model ran on, cpu or cuda.
        machine: In words.
        num_cpus: Its CPUs.
        stages: By name, each in a process with one thread while all CPUs are busy with the same.
        model_all_threads: Of the model in one process with as many threads as CPUs; on a GPU as in `stages`.
        ray_cpu_s: CPU seconds an image of the real run beyond those of the stages: Ray's processes, and handing on.
        run_images_per_s: Of the real run, start-up not counted.
        run_workers: Copies of the model in it.
        run_threads: Threads of each.
        run_decoded_ahead: Share of its images that had been decoded before, while the model was loaded.
        startup_s: Of the real run, and what it took to finish.
        worker_startup_cpu_s: CPU seconds until a copy of the model can begin.
        image_bytes: Of an encoded image, on average.
        pixel_bytes: Of a decoded image, on average.
        gradient_bytes: Of the model's parameters that learn.
        waiting_s: By which a step of training takes longer where several processes of the machine take it together.
        waiting_workers: How many these were.
        batch_size: Images that the model saw at once.
        source_read_s: Seconds to wait for an image from where the user's data are, one at a time.
    """

    job: str
    model: str
    device: str
    machine: str
    num_cpus: int
    stages: Mapping[str, StageCost]
    model_all_threads: StageCost
    ray_cpu_s: float
    run_images_per_s: float
    run_workers: int
    run_threads: int
    run_decoded_ahead: float
    startup_s: float
    worker_startup_cpu_s: float
    image_bytes: float
    pixel_bytes: float
    gradient_bytes: float
    waiting_s: float
    waiting_workers: int
    batch_size: int
    source_read_s: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that JSON can hold."""
        return {"probe_version": PROBE_VERSION, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, content: Any, *, where: str) -> Self:
        """Rebuild a probe from `to_dict`.

        Raises:
            UserError: It is something else.
        """
        if not isinstance(content, dict) or content.get("probe_version") != PROBE_VERSION:
            raise UserError(f"{where} is not a probe of this raydet; write one with raydet plan --save-probe FILE")
        values = {name: value for name, value in content.items() if name != "probe_version"}
        try:
            stages = {name: StageCost(**cost) for name, cost in values.pop("stages").items()}
            all_threads = StageCost(**values.pop("model_all_threads"))
            return cls(**values, stages=stages, model_all_threads=all_threads)
        except (AttributeError, KeyError, TypeError) as error:
            raise UserError(f"{where} is not a complete probe ({error}); write it again with --save-probe") from None

    def model_cost(self, num_threads: int) -> StageCost:
        """Interpolate the model's cost for a number of threads from its costs with one and with all."""
        one, several = self.stages["model"], self.model_all_threads
        if self.device != "cpu" or self.num_cpus == 1:
            return one
        parallel_s = max(0.0, one.wall_s - several.wall_s) / (1 - 1 / self.num_cpus)
        wall_s = max(one.wall_s - parallel_s, 0.0) + parallel_s / num_threads
        share = min(1.0, (num_threads - 1) / (self.num_cpus - 1))
        return StageCost(cpu_s=one.cpu_s + share * (several.cpu_s - one.cpu_s), wall_s=wall_s)


@dataclass(frozen=True, kw_only=True)
class NodeGroup:
    """Nodes of one kind.

    Attributes:
        name: For the table.
        num_nodes: How many.
        num_cpus: CPUs of each.
        num_gpus: GPUs of each.
        price_per_hour: Of each, in any currency.
    """

    name: str
    num_nodes: int
    num_cpus: int
    num_gpus: int = 0
    price_per_hour: float | None = None


@dataclass(frozen=True, kw_only=True)
class Workers:
    """Copies of the model: how many, the threads of each, and whether each has a GPU."""

    number: int
    threads: int
    on_gpu: bool


@dataclass(frozen=True, kw_only=True)
class StageLoad:
    """A stage on a cluster.

    Attributes:
        cpu_s: CPU seconds an image.
        images_per_s: If the stage had the cluster to itself; null where it costs nothing.
        busy_share: Of the CPUs, or of the workers where it is the model's, at the rate of the whole.
    """

    cpu_s: float
    images_per_s: float | None
    busy_share: float


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Predicted performance of a cluster.

    Attributes:
        images_per_s: After start-up.
        limits: Images per second that each resource allows for, by its name.
        bottleneck: The name of the lowest limit.
        stages: By name.
        cpus_to_balance: CPUs beside those of the GPU nodes with which these would be just busy; null without GPUs.
    """

    images_per_s: float
    limits: Mapping[str, float]
    bottleneck: str
    stages: Mapping[str, StageLoad]
    cpus_to_balance: float | None


def check_devices(devices: Sequence[str], *, needs_gpu: bool) -> None:
    """Check that the model was measured on the device that it will run on.

    Raises:
        UserError: It was not.
    """
    if needs_gpu and set(devices) == {"cpu"}:
        raise UserError(
            "the cluster has GPUs, but the model was not measured on one; run raydet plan with --save-probe gpu.json "
            "on a GPU node, and set --probe cpu.json,gpu.json here"
        )
    if not needs_gpu and "cpu" not in devices:
        raise UserError(
            "the cluster has no GPU, but the model was measured on one; measure with --no-use-gpu, or set "
            "--probe to a probe of a machine without a GPU"
        )


def combine(probes: Sequence[Probe], *, needs_gpu: bool) -> tuple[Probe, Probe]:
    """Return the probe for the CPUs and the probe for the model.

    Raises:
        UserError: They are of different jobs, or none is of what the model is to run on.
    """
    jobs = sorted({probe.job for probe in probes})
    if len(jobs) > 1:
        raise UserError(f"the probes are for different jobs ({' and '.join(jobs)}); measure both with the same --job")
    check_devices([probe.device for probe in probes], needs_gpu=needs_gpu)
    of_cpu = next((probe for probe in probes if probe.device == "cpu"), probes[0])
    of_gpu = next((probe for probe in probes if probe.device != "cpu"), of_cpu)
    return of_cpu, of_gpu if needs_gpu else of_cpu


def startup_s(probe: Probe, groups: Sequence[NodeGroup], workers: Workers) -> float:
    """Return the seconds until all workers run, and to finish, by the module's formula.

    Args:
        probe: Whose run it is compared with.
        groups: The cluster's nodes.
        workers: Copies of the model, which come up on the nodes that have what they compute on.
    """
    num_cpus = sum(group.num_nodes * group.num_cpus for group in groups if group.num_gpus or not workers.on_gpu)
    more_a_cpu = workers.number / num_cpus - probe.run_workers / probe.num_cpus
    return probe.startup_s + max(0.0, more_a_cpu) * probe.worker_startup_cpu_s


def forecast(
    of_cpu: Probe,
    of_model: Probe,
    groups: Sequence[NodeGroup],
    workers: Workers,
    *,
    batch_size: int,
    network_bytes_per_s: float,
) -> Forecast:
    """Predict the performance of a cluster by the module's formula.

    Args:
        of_cpu: Probe whose stages count for the CPUs.
        of_model: Probe whose model counts, and whatever runs beside it on the same nodes.
        groups: The cluster's nodes.
        workers: Copies of the model.
        batch_size: In training, images of a step over all workers.
        network_bytes_per_s: In training, between nodes.
    """
    num_nodes = sum(group.num_nodes for group in groups)
    step_bytes_per_s = network_bytes_per_s if num_nodes > 1 else None
    costs = _costs(of_cpu, of_model, workers)
    raw = _limits(costs, of_model, groups, workers, batch_size=batch_size, network_bytes_per_s=step_bytes_per_s)
    reached = dict.fromkeys(("CPUs", "decoding"), _share_reached(of_cpu))
    limits = {name: limit * reached.get(name, _share_reached(of_model)) for name, limit in raw.items()}
    if of_cpu.source_read_s > 0 and of_cpu.job == "predict":
        limits["reading"] = max(2, workers.number) / of_cpu.source_read_s
    bottleneck = min(limits, key=lambda name: limits[name])
    rate = limits[bottleneck]
    num_cpus = sum(group.num_nodes * group.num_cpus for group in groups)
    stages = {
        name: StageLoad(
            cpu_s=cost.cpu_s,
            images_per_s=num_cpus / cost.cpu_s if cost.cpu_s else None,
            busy_share=rate * cost.cpu_s / num_cpus,
        )
        for name, cost in costs.items()
    }
    stages["model"] = StageLoad(
        cpu_s=costs["model"].cpu_s, images_per_s=raw["model"], busy_share=min(1.0, rate / raw["model"])
    )
    wanted = None
    if workers.on_gpu:
        # More CPUs also decode more.
        without_cpus = min(limit for name, limit in limits.items() if name not in ("CPUs", "decoding"))
        all_cpus = without_cpus * sum(cost.cpu_s for cost in costs.values()) / reached["CPUs"]
        wanted = max(0.0, all_cpus - sum(group.num_nodes * group.num_cpus for group in groups if group.num_gpus))
    return Forecast(images_per_s=rate, limits=limits, bottleneck=bottleneck, stages=stages, cpus_to_balance=wanted)


def _costs(of_cpu: Probe, of_model: Probe, workers: Workers) -> dict[str, StageCost]:
    """Return the cost of an image by stage; resizing and the model as measured on the model's machine."""
    costs = dict(of_cpu.stages)
    if "prepare" in costs:
        costs["prepare"] = of_model.stages["prepare"]
    costs["model"] = of_model.model_cost(workers.threads)
    costs[RAY] = StageCost(cpu_s=of_cpu.ray_cpu_s, wall_s=0.0)
    return costs


def _limits(
    costs: Mapping[str, StageCost],
    of_model: Probe,
    groups: Sequence[NodeGroup],
    workers: Workers,
    *,
    batch_size: int,
    network_bytes_per_s: float | None,
) -> dict[str, float]:
    """Return images per second by resource at full utilization."""
    total_cpus = sum(group.num_nodes * group.num_cpus for group in groups)
    # While the model runs, the next images are resized in the same process.
    beside = costs["prepare"] if "prepare" in costs else StageCost(cpu_s=0.0, wall_s=0.0)
    wall_s = max(costs["model"].wall_s, beside.wall_s)
    if of_model.job == "train":
        others = (workers.number - 1) / workers.number
        together_s = 0.0
        if of_model.waiting_workers > 1:
            together_s += of_model.waiting_s * others / (1 - 1 / of_model.waiting_workers)
        if network_bytes_per_s is not None:
            together_s += 2 * others * of_model.gradient_bytes / network_bytes_per_s
        wall_s += together_s * workers.number / batch_size
    model_s, held_s = costs["model"].cpu_s, workers.threads * wall_s
    others_s = sum(cost.cpu_s for name, cost in costs.items() if name != "model")
    limits = {"CPUs": total_cpus / (model_s + others_s), "model": workers.number / wall_s}
    waits_for_others = workers.threads > 1 or (of_model.job == "train" and workers.number > 1)
    if waits_for_others and not workers.on_gpu:
        limits["threads"] = total_cpus / (held_s + others_s)
    limits["decoding"] = _decoding_tasks(groups, workers) / max(costs["decode"].wall_s, 1e-9)
    if workers.on_gpu:
        gpu_cpus = sum(group.num_nodes * group.num_cpus for group in groups if group.num_gpus)
        limits["CPUs of GPU nodes"] = gpu_cpus / max(costs["model"].cpu_s + beside.cpu_s, 1e-9)
    return limits


def _decoding_tasks(groups: Sequence[NodeGroup], workers: Workers) -> float:
    """Return the concurrent decoding tasks, as in `cluster.share_out`: workers hold at most half of the CPUs."""
    num_cpus = sum(group.num_nodes * group.num_cpus for group in groups)
    reserved = min(num_cpus / 2 / workers.number, max(group.num_cpus for group in groups) / 2)
    if workers.on_gpu:
        reserved = min(reserved, *(group.num_cpus / group.num_gpus / 2 for group in groups if group.num_gpus))
    left = num_cpus - reserved * workers.number
    return left if left >= 4 else 2 * left


def _share_reached(probe: Probe) -> float:
    """Return the real run's rate relative to the formula's for the same machine."""
    on_gpu = probe.device != "cpu"
    workers = Workers(number=probe.run_workers, threads=probe.run_threads, on_gpu=on_gpu)
    machine = NodeGroup(
        name="measured", num_nodes=1, num_cpus=probe.num_cpus, num_gpus=probe.run_workers if on_gpu else 0
    )
    costs = _costs(probe, probe, workers)
    for stage in ("read", "decode"):
        share = 1 - probe.run_decoded_ahead
        costs[stage] = StageCost(cpu_s=costs[stage].cpu_s * share, wall_s=costs[stage].wall_s * share)
    limits = _limits(costs, probe, [machine], workers, batch_size=probe.batch_size, network_bytes_per_s=None)
    # Where it was faster than is possible, the stages were measured in slower minutes of a machine that others use too.
    return min(1.0, probe.run_images_per_s / min(limits.values()))

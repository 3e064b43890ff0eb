"""The throughput of a cluster, from the cost of an image in each stage and the available resources.

The model is deliberately simple, a pipeline whose queues do not matter:

    images/s = min( CPUs      : c / Σ s               all stages share the CPUs
                    threads   : c / (T w(T) + Σ' s)   threads hold their CPUs; Σ' is over all stages but the model
                    workers   : W / w(T)              W copies of the model with T threads, or one GPU, each
                    decoding  : d / s_d               d decoding tasks on the CPUs that workers do not reserve
                    GPU nodes : g / Σ" s              Σ" is over the stages that only they run: resizing, the model
                    reading   : r / q )               r reading tasks that wait q seconds for the storage
    seconds = start-up + max(0, W / c - W' / c') u + images / (images/s)

where s is a stage's CPU seconds per image, c the number of all CPUs and g that of the GPU nodes' CPUs.
w(T) = a + b / T is Amdahl's law (1967), fitted to the measured w(1) and w(all CPUs of the measured machine). The
threads of a worker hold their CPUs even while they wait for each other or for another worker. A training step of
W workers over a batch of B images takes B / W · w(T) + h + 2 (W - 1) / W · p / n seconds; divided by the B / W images
of a worker, this is its w. The term h is the wait for the slowest worker and the exchange of gradients within a node;
it is measured with one worker per CPU and scales with (W - 1) / W, too. The last term, on several nodes, is a ring
all-reduce of p bytes of gradients at n bytes per second (Patarasuk and Yuan, 2009), with no overlap assumed. Starting
a copy of the model takes u CPU seconds; start-up is that of the measured run, with W' copies on c' CPUs.

All limits are multiplied by the ratio of a real run's rate on the measured machine to the formula's.
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
        cpu_s: CPU seconds of all threads.
        wall_s: Wall-clock seconds of one process.
    """

    cpu_s: float
    wall_s: float


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Measurements on one machine.

    Attributes:
        job: predict or train.
        model: Description of the model.
        device: Device of the model, cpu or cuda.
        machine: Description of the machine.
        num_cpus: CPUs of the machine.
        stages: Cost by stage, in single-threaded processes that keep all CPUs busy.
        model_all_threads: Cost of the model in one process with as many threads as CPUs; on a GPU as in `stages`.
        ray_cpu_s: CPU seconds per image of the real run beyond those of the stages: Ray's processes and transfers.
        run_images_per_s: Images per second of the real run after start-up.
        run_workers: Copies of the model in the real run.
        run_threads: Threads of each copy.
        run_decoded_ahead: Share of the real run's images that were decoded while the model was loaded.
        startup_s: Seconds of start-up and shutdown of the real run.
        worker_startup_cpu_s: CPU seconds until a copy of the model is ready.
        image_bytes: Average bytes of an encoded image.
        pixel_bytes: Average bytes of a decoded image.
        gradient_bytes: Bytes of the gradients of all trainable parameters.
        waiting_s: Additional seconds of a training step when several processes of the machine take it together.
        waiting_workers: Number of these processes.
        batch_size: Images per batch of the model.
        source_read_s: Seconds to read one image from the user's storage, one at a time.
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
        """Return JSON-compatible values."""
        return {"probe_version": PROBE_VERSION, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, content: Any, *, where: str) -> Self:
        """Rebuild a probe from `to_dict`.

        Raises:
            UserError: `content` is not a probe of this version, or is incomplete.
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
        name: Name for the user.
        num_nodes: Number of nodes.
        num_cpus: CPUs of each node.
        num_gpus: GPUs of each node.
        price_per_hour: Price of a node, in any currency.
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
    """Load of a stage on a cluster.

    Attributes:
        cpu_s: CPU seconds per image.
        images_per_s: Images per second if no other stage used the cluster; None if the stage costs nothing.
        busy_share: Share of the CPUs, or of the workers for the model, that is busy at the rate of the job.
    """

    cpu_s: float
    images_per_s: float | None
    busy_share: float


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Predicted performance of a cluster.

    Attributes:
        images_per_s: Images per second after start-up.
        limits: Images per second that each resource allows, by resource.
        bottleneck: Name of the lowest limit.
        stages: Load by stage.
        cpus_to_balance: CPUs outside the GPU nodes that just keep the GPUs busy; None without GPUs.
    """

    images_per_s: float
    limits: Mapping[str, float]
    bottleneck: str
    stages: Mapping[str, StageLoad]
    cpus_to_balance: float | None


def check_devices(devices: Sequence[str], *, needs_gpu: bool) -> None:
    """Check that the model was measured on the device that it will run on.

    Raises:
        UserError: It was measured on another device.
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
        UserError: The probes are for different jobs, or none was measured on the required device.
    """
    jobs = sorted({probe.job for probe in probes})
    if len(jobs) > 1:
        raise UserError(f"the probes are for different jobs ({' and '.join(jobs)}); measure both with the same --job")
    check_devices([probe.device for probe in probes], needs_gpu=needs_gpu)
    of_cpu = next((probe for probe in probes if probe.device == "cpu"), probes[0])
    of_gpu = next((probe for probe in probes if probe.device != "cpu"), of_cpu)
    return of_cpu, of_gpu if needs_gpu else of_cpu


def startup_s(probe: Probe, groups: Sequence[NodeGroup], workers: Workers) -> float:
    """Return the seconds of start-up and shutdown by the module's formula.

    Args:
        probe: Measurements of the real run.
        groups: Nodes of the cluster.
        workers: Copies of the model; with GPUs they start on the GPU nodes only.
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
        of_cpu: Probe for the stages on CPUs.
        of_model: Probe for the model and the stages that run on the model's nodes.
        groups: Nodes of the cluster.
        workers: Copies of the model.
        batch_size: Images per training step over all workers.
        network_bytes_per_s: Bandwidth between nodes, in training.
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
    """Return the images per second that each resource allows at full utilisation."""
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
    # A ratio above 1 means that the machine was slower while the stages were measured, as shared machines may be.
    return min(1.0, probe.run_images_per_s / min(limits.values()))

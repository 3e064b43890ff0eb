"""The result of `plan` as a table for the terminal and as JSON."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from raydet.cluster.job_report import rate_text
from raydet.common.console import aligned
from raydet.config import PlanConfig
from raydet.planning.throughput import RAY, Forecast, NodeGroup, Probe, Workers

_NAMES = {
    "predict": {"decode": "decode", "prepare": "resize", RAY: "Ray and transfers"},
    "train": {"decode": "decode and augment", "model": "model, one step", RAY: "Ray and transfers"},
}
_ADVICE = {
    "CPUs": "add CPU nodes; more copies of the model do not help",
    "model": "add workers (GPUs, or more of the CPUs with --num-workers); more decoding does not help",
    "threads": "they hold CPUs while they wait for each other; use more workers with fewer threads "
    "(--threads-per-worker), and in training a larger batch",
    "decoding": "lower --cpus-per-worker so that more CPUs decode, or add CPU nodes",
    "CPUs of GPU nodes": "use GPU nodes with more CPUs, which resize the images for their GPUs",
    "reading": "keep the images nearer to the cluster, or in tables or tar files",
}


@dataclass(frozen=True)
class PlanResult:
    """Time and cost of a job on a cluster.

    Attributes:
        num_images: Total number of images over all epochs.
        groups: Nodes of the cluster.
        workers: Copies of the model.
        forecast: Speed, limits and stages.
        startup_s: Seconds of start-up and shutdown.
        total_s: Seconds from start to end.
        cost: Total cost in the currency of the prices; None without prices.
        probes: Probe for the CPUs and probe for the model.
        config: Options of the plan.
    """

    num_images: int
    groups: tuple[NodeGroup, ...]
    workers: Workers
    forecast: Forecast
    startup_s: float
    total_s: float
    cost: float | None
    probes: tuple[Probe, Probe]
    config: PlanConfig

    @property
    def storage_mb_per_s(self) -> float:
        """Megabytes (10⁶ bytes) of encoded images that the storage must deliver per second."""
        return self.forecast.images_per_s * self.probes[0].image_bytes / 1e6

    @property
    def pixels_mb_per_s(self) -> float:
        """Megabytes of decoded pixels that go from decoders to workers per second, at worst all over the network."""
        return self.forecast.images_per_s * self.probes[0].pixel_bytes / 1e6

    @property
    def cpu_nodes_per_gpu_node(self) -> float | None:
        """CPU nodes that keep a GPU node busy; None unless there are both."""
        gpu_nodes = sum(group.num_nodes for group in self.groups if group.num_gpus)
        of_cpu = [group for group in self.groups if not group.num_gpus]
        cpu_nodes = sum(group.num_nodes for group in of_cpu)
        if not gpu_nodes or not cpu_nodes or self.forecast.cpus_to_balance is None:
            return None
        cpus_of_a_node = sum(group.num_nodes * group.num_cpus for group in of_cpu) / cpu_nodes
        return self.forecast.cpus_to_balance / cpus_of_a_node / gpu_nodes

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "num_images": self.num_images,
            "images_per_s": self.forecast.images_per_s,
            "startup_s": self.startup_s,
            "total_s": self.total_s,
            "cost": self.cost,
            "bottleneck": self.forecast.bottleneck,
            "limits": dict(self.forecast.limits),
            "stages": {name: dataclasses.asdict(load) for name, load in self.forecast.stages.items()},
            "cpus_to_balance": self.forecast.cpus_to_balance,
            "cpu_nodes_per_gpu_node": self.cpu_nodes_per_gpu_node,
            "storage_mb_per_s": self.storage_mb_per_s,
            "pixels_mb_per_s": self.pixels_mb_per_s,
            "nodes": [dataclasses.asdict(group) for group in self.groups],
            "workers": dataclasses.asdict(self.workers),
            "command": self.command(),
            "assumptions": self.assumptions(),
            "probes": {"cpu": self.probes[0].to_dict(), "model": self.probes[1].to_dict()},
            "config": dataclasses.asdict(self.config),
        }

    def command(self) -> str:
        """Return the command with the options for the real job."""
        batch = f"--batch-size {self.config.batch} --precision {self.config.precision}"
        threads = "" if self.workers.on_gpu else f" --threads-per-worker {self.workers.threads}"
        engine = f" --engine {self.config.engine}" if self.config.job == "predict" else ""
        return f"raydet {self.config.job} --num-workers {self.workers.number}{threads}{engine} {batch}"

    def lines(self) -> list[str]:
        """Return the plan for the terminal."""
        answer = self.forecast
        nodes = ", ".join(_describe(group) for group in self.groups)
        rate = f"{rate_text(answer.images_per_s)} images/s"
        passes = f" ({self.config.epochs} epochs)" if self.config.epochs > 1 else ""
        lines = [
            f"{self.config.job} of {self.num_images:,} images{passes} on {nodes}",
            *self._table(),
            f"time: {_duration(self.total_s)}, including {_duration(self.startup_s)} start-up; {rate}",
        ]
        if self.cost is not None:
            lines.append(f"cost: {self.cost:,.2f}, {self.cost / self.num_images * 1e6:,.2f} per million images")
        lines.append(self._bottleneck())
        lines += self._balance()
        lines.append(
            f"storage must deliver {self.storage_mb_per_s:,.1f} MB/s of images; up to {self.pixels_mb_per_s:,.1f} MB/s "
            "of pixels go from decoders to workers, over the network if these are on other nodes"
        )
        lines += [f"assumed: {text}" for text in self.assumptions()]
        lines.append(f"run it with: {self.command()} …")
        if self.config.out is not None:
            lines.append(f"plan: {self.config.out}")
        return lines

    def _table(self) -> list[str]:
        rows = [("stage", "CPU ms per image", "images/s alone", "busy")]
        for name, load in self.forecast.stages.items():
            rows.append(
                (
                    _NAMES[self.config.job].get(name, name),
                    f"{load.cpu_s * 1e3:,.2f}",
                    rate_text(load.images_per_s),
                    f"{load.busy_share:.0%} of the {'workers' if name == 'model' else 'CPUs'}",
                )
            )
        return aligned(rows)

    def _bottleneck(self) -> str:
        answer = self.forecast
        if answer.bottleneck != "CPUs":
            return f"bottleneck: {answer.bottleneck}; {_ADVICE[answer.bottleneck]}"
        total_s = sum(load.cpu_s for load in answer.stages.values())
        name, load = max(answer.stages.items(), key=lambda item: item[1].cpu_s)
        stage = _NAMES[self.config.job].get(name, name)
        return f"bottleneck: CPUs, {load.cpu_s / total_s:.0%} of their time for {stage}; {_ADVICE['CPUs']}"

    def _balance(self) -> list[str]:
        answer = self.forecast
        if answer.cpus_to_balance is None:
            return []
        cpus = f"{answer.cpus_to_balance:,.1f} CPUs besides their own keep the GPU nodes busy"
        ratio = self.cpu_nodes_per_gpu_node
        return [f"balance: {cpus}" + ("" if ratio is None else f": {ratio:.2g} such CPU nodes per GPU node")]

    def assumptions(self) -> list[str]:
        """List the assumptions behind the numbers, besides the formula."""
        of_cpu, of_model = self.probes
        machines = of_cpu.machine if of_cpu == of_model else f"{of_cpu.machine}; the model on {of_model.machine}"
        found = [
            f"a CPU of the cluster is as fast as one of the measured machine ({machines})",
            "throughput grows in proportion to CPUs, GPUs and nodes; all nodes are up, and none is lost",
        ]
        if self.config.data is None and not self.config.probe:
            size = self.config.generated_size
            found.append(f"images resemble the generated ones ({size} × {size}); --data measures with real images")
        if self.config.job == "train":
            found.append("validation and checkpoints are not counted")
            if sum(group.num_nodes for group in self.groups) > 1:
                found.append(f"{self.config.network_gbit_per_s:g} Gbit/s between nodes")
        if self.cost is not None:
            found.append("all nodes are paid for from start to end; the head and network traffic are not counted")
        return found


def _describe(group: NodeGroup) -> str:
    gpus = f" and {group.num_gpus} GPU{'s' if group.num_gpus > 1 else ''}" if group.num_gpus else ""
    return f"{group.num_nodes} × {group.num_cpus} CPUs{gpus} ({group.name})"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 100 else f"{minutes} min"

"""`plan`: time and cost of a job on a cluster, from a short measurement on this machine.

`probe.py` measures, `throughput.py` calculates, and `answer.py` formats the result.
"""

import json
from collections.abc import Sequence

from raydet.common.console import Console
from raydet.common.errors import UserError
from raydet.common.redaction import without_secrets
from raydet.config import PlanConfig
from raydet.models.checkpoints import read_checkpoint
from raydet.planning.answer import PlanResult
from raydet.planning.nodes import node_groups, with_price
from raydet.planning.probe import measure, threads_of_a_worker
from raydet.planning.throughput import NodeGroup, Probe, Workers, combine, forecast, startup_s
from raydet.tables import storage


def plan(config: PlanConfig, *, console: Console | None = None) -> PlanResult:
    """Estimate time and cost on a cluster from a measurement on this machine, or saved measurements.

    Raises:
        UserError: The model, the images, the cluster file or a probe is invalid.
        RunError: A measurement failed.
    """
    groups = node_groups(config)
    if any(group.num_gpus for group in groups) and config.engine != "torch":
        raise UserError(f"--engine {config.engine} runs on CPUs, and the cluster has GPUs; choose --engine torch")
    _check_prices(config, groups)
    console = console or Console()
    probes = [_read_probe(uri, config) for uri in config.probe or ()]
    if not probes:
        if config.checkpoint is not None:
            read_checkpoint(config.checkpoint)
        needs_gpu = any(group.num_gpus for group in groups) if groups else None
        probes = [measure(config, needs_gpu=needs_gpu, say=console.line)]
        if config.save_probe is not None:
            storage.write_bytes(config.save_probe, json.dumps(without_secrets(probes[0].to_dict()), indent=1).encode())
    if not groups:
        on_gpu = int(probes[0].device != "cpu")
        here = NodeGroup(name="this machine", num_nodes=1, num_cpus=probes[0].num_cpus, num_gpus=on_gpu)
        groups = (with_price(config, here),)
        _check_prices(config, groups)
    result = plan_for(config, groups, probes)
    if config.out is not None:
        storage.write_bytes(config.out, json.dumps(without_secrets(result.to_dict()), indent=1).encode())
    return result


def plan_for(config: PlanConfig, groups: Sequence[NodeGroup], probes: Sequence[Probe]) -> PlanResult:
    """Calculate time and cost on a cluster from measurements.

    Raises:
        UserError: The probes do not suit the cluster, or the workers do not fit on it.
    """
    of_cpu, of_model = combine(probes, needs_gpu=any(group.num_gpus for group in groups))
    workers = _workers(config, groups)
    answer = forecast(
        of_cpu,
        of_model,
        groups,
        workers,
        batch_size=config.batch,
        network_bytes_per_s=config.network_gbit_per_s * 1e9 / 8,
    )
    num_images = config.images * config.epochs
    starting_s = max(startup_s(probe, groups, workers) for probe in (of_cpu, of_model))
    total_s = starting_s + num_images / answer.images_per_s
    prices = [group.num_nodes * group.price_per_hour for group in groups if group.price_per_hour is not None]
    return PlanResult(
        num_images=num_images,
        groups=tuple(groups),
        workers=workers,
        forecast=answer,
        startup_s=starting_s,
        total_s=total_s,
        cost=sum(prices) * total_s / 3600 if prices else None,
        probes=(of_cpu, of_model),
        config=config,
    )


def _workers(config: PlanConfig, groups: Sequence[NodeGroup]) -> Workers:
    """Return the copies of the model: one per GPU; without GPUs enough to fill the CPUs, in training one per node."""
    num_gpus = sum(group.num_nodes * group.num_gpus for group in groups)
    smallest = min(group.num_cpus for group in groups)
    threads = threads_of_a_worker(config, smallest)
    if num_gpus:
        filling = num_gpus
    elif config.job == "train" and config.threads_per_worker is None:
        filling = sum(group.num_nodes for group in groups)
    else:
        filling = sum(group.num_nodes * max(1, group.num_cpus // threads) for group in groups)
    if config.num_workers is None:
        number = filling if config.job == "predict" else min(filling, config.batch)
    else:
        number = config.num_workers
        if config.threads_per_worker is None and number > filling:
            most = sum(group.num_nodes * group.num_cpus for group in groups)
            threads = max(1, most // number)
    if num_gpus and number > num_gpus:
        raise UserError(f"{number} workers require {number} GPUs, but the cluster has {num_gpus}; lower --num-workers")
    if config.job == "train" and number > config.batch:
        raise UserError(
            f"--batch-size counts the images of all workers: {config.batch} images cannot keep {number} "
            f"workers busy; raise --batch-size or lower --num-workers"
        )
    return Workers(number=number, threads=threads, on_gpu=num_gpus > 0)


def _check_prices(config: PlanConfig, groups: Sequence[NodeGroup]) -> None:
    if config.price_per_cpu_node_hour is None and config.price_per_gpu_node_hour is None:
        return
    for group in groups:
        if group.price_per_hour is None:
            kind = "gpu" if group.num_gpus else "cpu"
            raise UserError(f"the {group.name} have no price; set --price-per-{kind}-node-hour as well")


def _read_probe(uri: str, config: PlanConfig) -> Probe:
    try:
        content = json.loads(storage.read_bytes(uri))
    except FileNotFoundError:
        raise UserError(f"no such probe: {uri}; raydet plan --save-probe FILE writes one") from None
    except ValueError as error:
        raise UserError(f"{uri} is not valid JSON: {error}") from None
    probe = Probe.from_dict(content, where=uri)
    if probe.job != config.job:
        raise UserError(
            f"{uri} was measured for {probe.job}, but the job is {config.job}; measure with --job {config.job}"
        )
    return probe

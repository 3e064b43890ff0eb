"""Ray's own division of a cluster between executions: the stream can run on whatever share it gets."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.data._internal.cluster_autoscaler.base_autoscaling_coordinator import ResourceRequestPriority
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import _AutoscalingCoordinatorActor

from raydet.augmentation.view import View
from raydet.cluster.shares import decoders_of
from raydet.models.geometry import ResizeRule
from raydet.tables.table import open_table
from raydet.training.feeding.ordering import RunPlan
from raydet.training.feeding.stream import run_stream
from raydet.training.feeding.views import Views

_Node = dict[str, float]


def _budgets(nodes: Sequence[_Node], workers: Sequence[_Node], num_executions: int) -> list[dict[str, float]]:
    """Return the resources that Ray's coordinator gives to each execution, beside the training workers."""
    listed = [{"NodeID": str(number), "Alive": True, "Resources": node} for number, node in enumerate(nodes)]
    coordinator = _AutoscalingCoordinatorActor(
        get_current_time=lambda: 0.0, send_resources_request=lambda *_: None, get_cluster_nodes=lambda: listed
    )
    coordinator.request_resources("train", list(workers), 1e9, priority=ResourceRequestPriority.HIGH)
    names = [f"execution {number}" for number in range(num_executions)]
    for name in names:
        coordinator.request_resources(name, [], 1e9, request_remaining=["CPU", "GPU", "object_store_memory"])
    budgets = []
    for name in names:
        total: dict[str, float] = {}
        for share in coordinator.get_reserved_resources(name, recompute=True).values():
            for key, amount in share.items():
                total[key] = total.get(key, 0.0) + amount
        budgets.append(total)
    return budgets


def _node(cpus: float, gpus: float = 0.0) -> _Node:
    return {"CPU": cpus, **({"GPU": gpus} if gpus else {}), "memory": cpus * 2**32, "object_store_memory": cpus * 2**30}


@pytest.mark.parametrize(
    ("nodes", "workers_per_node", "worker"),
    [
        ([_node(2)], 1, {"CPU": 1.0}),
        ([_node(2)], 2, {"CPU": 1.0}),
        ([_node(8)], 2, {"CPU": 4.0}),
        ([_node(16, 1)], 1, {"CPU": 2.0, "GPU": 1.0}),
        ([_node(96, 8)], 8, {"CPU": 2.0, "GPU": 1.0}),
        ([_node(96, 8)] * 50, 8, {"CPU": 2.0, "GPU": 1.0}),
        ([], 0, {"CPU": 1.0}),
    ],
    ids=["1 rank", "2 ranks", "laptop", "1 GPU", "8 GPUs", "50 × 8", "no node yet"],
)
def test_every_execution_gets_memory_and_decoders(nodes: list[_Node], workers_per_node: int, worker: _Node) -> None:
    """Check a stream for each node, two trials and a validation: CPUs may run out, and the stream needs none."""
    num_executions = max(len(nodes), 1) + 3
    budgets = _budgets(nodes, [worker] * (len(nodes) * workers_per_node), num_executions)
    workers = [workers_per_node] * len(nodes)
    decoders = decoders_of(nodes, workers=workers, cpus_per_worker=worker["CPU"], executions=num_executions)
    assert all(number >= 1 for number in decoders)
    if nodes:
        assert all(budget["object_store_memory"] > 0 for budget in budgets)
    else:
        assert not any(budgets)
        joined = _budgets([_node(4)], [worker], num_executions)
        assert all(budget["object_store_memory"] > 0 for budget in joined)
    if len(nodes) == 1 and nodes[0]["CPU"] == 2:
        assert not any(budget.get("CPU") for budget in budgets)  # stages that need a CPU would never run


@pytest.mark.usefixtures("ray_cluster")
def test_the_stages_of_a_stream_need_no_cpu(shapes: Path) -> None:
    table = open_table(str(shapes / "train"), "images")
    plan = RunPlan(
        train_groups=tuple((group.num_rows, group.num_bytes) for group in table.row_groups()),
        num_val=1,
        batch_size=4,
        accumulate=1,
        epochs=1,
        seed=0,
        window_bytes=2**20,
        validate_every=1,
        validate_batch_size=4,
    )
    (iterator,) = run_stream(
        plan,
        train=table,
        val=table,
        views=Views(View(resize_rule=ResizeRule(mode="fixed", size_hw=(32, 32)))),
        world_size=1,
        ranks=[0],
        start_epoch=0,
        start_step=0,
        decoders=[ray.get_runtime_context().get_node_id()],
    )
    dataset: Any = iterator._base_dataset  # type: ignore[attr-defined]
    operators = list(dataset._logical_plan.dag.post_order_iter())
    requested = [getattr(one, "ray_remote_args", getattr(one, "_ray_remote_args", None)) for one in operators]
    assert [arguments["num_cpus"] for arguments in requested if arguments] == [0] * len(operators)

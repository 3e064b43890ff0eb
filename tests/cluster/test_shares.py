"""The arithmetic of resource shares, on described clusters."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import ray

from raydet.cluster.ray_internals import NodeType, node_types
from raydet.cluster.shares import Resources, decoders_of, share_out, shares_of
from raydet.common.errors import UserError

Type = tuple[float, float, int | None]


def shares(
    *nodes: tuple[float, float],
    types: Sequence[Type] = (),
    may_grow: bool = False,
    num_workers: int = 1,
    **options: Any,
) -> Resources:
    """Compute the shares of a cluster of nodes (CPUs, GPUs) that may start nodes (CPUs, GPUs, maximum number)."""
    return shares_of(
        [{"CPU": cpus, "GPU": gpus} for cpus, gpus in nodes],
        node_types=[NodeType({"CPU": cpus, "GPU": gpus}, most) for cpus, gpus, most in types],
        may_grow=may_grow or bool(types),
        **{"min_workers": num_workers, "max_workers": num_workers, "use_gpu": None, "cpus_per_worker": None, **options},
    )


def test_half_of_the_cpus_go_to_the_workers() -> None:
    assert shares((2, 0)) == Resources(0.0, use_gpu=False, cpus_per_worker=1.0)
    assert shares((16, 0), num_workers=2) == Resources(0.0, use_gpu=False, cpus_per_worker=4.0)
    # A worker fits on the largest node.
    assert shares((4, 0), (4, 0)).cpus_per_worker == 2.0


@pytest.mark.parametrize(
    ("node", "expected"),
    [((96, 8), 2.0), ((8, 1), 2.0), ((4, 1), 2.0), ((2, 1), 1.0), ((12, 4), 1.0), ((1, 1), 0.5), ((4, 8), 0.25)],
)
def test_a_worker_with_a_gpu_holds_few_cpus(node: tuple[float, float], expected: float) -> None:
    assert shares(node).cpus_per_worker == shares(node, num_workers=int(node[1])).cpus_per_worker == expected
    # The smallest share of a GPU counts, so that a worker fits on any GPU node; CPU nodes change nothing.
    assert shares(node, (96, 8), (64, 0)).cpus_per_worker == expected


def test_a_gpu_worker_on_unknown_nodes_holds_one_cpu() -> None:
    assert shares((16, 0), may_grow=True, use_gpu=True).cpus_per_worker == 1.0


AWS: list[Type] = [(0, 0, 0), (16, 0, 16), (8, 1, 4)]
"""The node types of cluster.yaml."""


def test_a_cluster_without_nodes_is_divided_by_its_node_types() -> None:
    empty = shares((0, 0), types=AWS, num_workers=4)
    assert (empty.use_gpu, empty.num_gpus, empty.cpus_per_worker) == (True, 4.0, 2.0)
    assert "0 GPUs" in empty.notice and "wait" in empty.notice
    on_cpus = shares((0, 0), types=AWS, num_workers=4, use_gpu=False)
    assert (on_cpus.use_gpu, on_cpus.cpus_per_worker, on_cpus.notice) == (False, 8.0, "")
    # More workers than the cluster may ever have GPUs.
    many = shares((0, 0), types=AWS, num_workers=8)
    assert not many.use_gpu and "8 workers" in many.notice and "has 4" in many.notice
    forced = shares((0, 0), types=AWS, num_workers=8, use_gpu=True)
    assert forced.use_gpu and "at most 4" in forced.notice
    # Nodes that run are not counted twice; a kind without a limit has enough for anyone.
    running = shares((0, 0), (16, 0), *[(8, 1)] * 4, types=AWS, num_workers=4)
    assert (running.num_gpus, running.use_gpu, running.notice) == (4.0, True, "")
    assert shares((0, 0), types=[(8, 1, None)], num_workers=500).use_gpu


CLUSTER_YAML = """
max_workers: 5
head_node_type: head
available_node_types:
  head: {resources: {CPU: 0}}
  decode: {max_workers: 16, resources: {CPU: 16}}
  model: {resources: {CPU: 8, GPU: 1}, node_config: {}}
"""


def test_node_types_are_found_on_the_head(ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert node_types() == []
    for damaged in ("", "[1]", "max_workers: 5", CLUSTER_YAML.replace("GPU: 1", "GPU: x"), "{"):
        (tmp_path / "ray_bootstrap_config.yaml").write_text(damaged)
        assert node_types() == []
    (tmp_path / "ray_bootstrap_config.yaml").write_text(CLUSTER_YAML)
    expected = [NodeType({"CPU": 0}, 0), NodeType({"CPU": 16}, 16), NodeType({"CPU": 8, "GPU": 1}, 5)]
    assert node_types() == expected


def test_node_types_are_found_in_the_cluster(ray_cluster: None) -> None:
    from ray.core.generated import autoscaler_pb2
    from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_put

    ray_names: Any = ray._raylet
    messages: Any = autoscaler_pb2
    config = messages.ClusterConfig()
    config.node_group_configs.add(name="model", resources={"CPU": 8, "GPU": 1}, min_count=0, max_count=-1)
    config.node_group_configs.add(name="decode", resources={"CPU": 16}, min_count=0, max_count=4)
    where = {
        "key": ray_names.GCS_AUTOSCALER_CLUSTER_CONFIG_KEY,
        "namespace": ray_names.GCS_AUTOSCALER_STATE_NAMESPACE,
    }
    _internal_kv_put(value=config.SerializeToString(), **where)
    try:
        assert node_types() == [NodeType({"CPU": 8, "GPU": 1}, None), NodeType({"CPU": 16}, 4)]
    finally:
        _internal_kv_del(**where)


def test_fewer_gpus_than_workers_are_never_passed_over_in_silence() -> None:
    assert shares((4, 1)).use_gpu and not shares((4, 1)).notice
    two = shares((4, 1), num_workers=2)
    assert not two.use_gpu and "2 workers" in two.notice and "the cluster has 1" in two.notice
    assert not shares((4, 1), num_workers=2, use_gpu=False).notice
    growing = shares((4, 1), num_workers=2, use_gpu=True, may_grow=True)
    assert growing.use_gpu and "wait" in growing.notice
    with pytest.raises(UserError, match=r"--use-gpu .* 2 in total; .* has 1"):
        shares((4, 1), num_workers=2, use_gpu=True)


def test_workers_leave_cpus_for_decoding() -> None:
    with pytest.raises(UserError, match="--cpus-per-worker"):
        shares((4, 0), num_workers=2, cpus_per_worker=2.0)
    assert shares((4, 0), num_workers=2, cpus_per_worker=2.0, may_grow=True).cpus_per_worker == 2.0


@pytest.mark.parametrize("nodes", [(), ((0, 0),)], ids=["no node", "a head without CPUs"])
def test_a_cluster_that_grows_from_zero(nodes: tuple[tuple[float, float], ...]) -> None:
    guessed = shares(*nodes, may_grow=True, num_workers=4)
    assert (guessed.use_gpu, guessed.cpus_per_worker) == (False, 1.0)
    assert "no node" in guessed.notice and "--use-gpu and --cpus-per-worker" in guessed.notice
    given = shares(*nodes, may_grow=True, num_workers=4, use_gpu=True, cpus_per_worker=6.0)
    assert (given.use_gpu, given.cpus_per_worker) == (True, 6.0)
    assert "no node" in given.notice and "--" not in given.notice


def decoders(*nodes: tuple[float, int], memory_gb: float = 1000, held: float = 1.0, executions: int = 1) -> list[int]:
    """Compute the decode processes of nodes given as (CPUs, workers)."""
    return list(
        decoders_of(
            [{"CPU": cpus, "memory": memory_gb * 2**30} for cpus, _ in nodes],
            workers=[workers for _, workers in nodes],
            cpus_per_worker=held,
            executions=executions,
        )
    )


@pytest.mark.parametrize(
    ("num_cpus", "expected"), [(0.5, 1), (1, 1), (2, 2), (3, 2), (4, 3), (8, 7)], ids=lambda value: f"{value}"
)
def test_decoders_of_a_laptop(num_cpus: float, expected: int) -> None:
    assert decoders((num_cpus, 1)) == [expected]
    # As many executions as there may be: each has a decoder, so that none waits for another.
    assert decoders((num_cpus, 1), executions=20) == [1]


def test_decoders_of_large_clusters() -> None:
    assert decoders((96, 8), held=2.0) == [80]
    fifty = [(96.0, 8)] * 50
    assert decoders(*fifty, held=2.0) == [80] * 50
    # Two trials and a validation share the nodes.
    assert decoders(*fifty, held=2.0, executions=3) == [26] * 50
    # A head without CPUs runs none; a node without workers decodes for the others with all of its CPUs.
    assert decoders((0, 0), (8, 1), (16, 0), held=2.0) == [0, 6, 16]
    # Workers that hold all CPUs, as after the loss of a node.
    assert decoders((4, 4), (4, 0)) == [2, 4]
    assert decoders() == []


def test_decoders_fit_into_the_memory() -> None:
    assert decoders((16, 1), memory_gb=8) == [5]
    assert decoders((16, 1), memory_gb=1) == [1]


def test_the_cluster_that_is_there_is_shared_out(ray_cluster: None) -> None:
    assert share_out(min_workers=1, max_workers=2, use_gpu=None, cpus_per_worker=None).cpus_per_worker == 0.5
    with pytest.raises(UserError, match="this machine has 0"):
        share_out(min_workers=1, max_workers=1, use_gpu=True, cpus_per_worker=0.5)
    assert ray.is_initialized()

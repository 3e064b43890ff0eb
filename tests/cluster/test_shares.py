"""The arithmetic of resource shares, on described clusters."""

from typing import Any

import pytest
import ray

from raydet.cluster.shares import Resources, decoders_of, share_out, shares_of
from raydet.common.errors import UserError


def shares(*nodes: tuple[float, float], may_grow: bool = False, num_workers: int = 1, **options: Any) -> Resources:
    """Compute the shares of a cluster whose nodes are given as (CPUs, GPUs)."""
    return shares_of(
        [{"CPU": cpus, "GPU": gpus} for cpus, gpus in nodes],
        may_grow=may_grow,
        **{"min_workers": num_workers, "max_workers": num_workers, "use_gpu": None, "cpus_per_worker": None, **options},
    )


def test_half_of_the_cpus_go_to_the_workers() -> None:
    assert shares((2, 0)) == Resources(0.0, use_gpu=False, cpus_per_worker=1.0, cpus_per_task=0.5)
    assert shares((16, 0), num_workers=2) == Resources(0.0, use_gpu=False, cpus_per_worker=4.0, cpus_per_task=1.0)
    # A worker fits on the largest node, together with the workers of the node's other GPUs.
    assert shares((4, 0), (4, 0)).cpus_per_worker == 2.0
    assert shares((32, 8), (8, 0), num_workers=2).cpus_per_worker == 2.0


def test_fewer_gpus_than_workers_are_never_passed_over_in_silence() -> None:
    assert shares((4, 1)).use_gpu and not shares((4, 1)).notice
    two = shares((4, 1), num_workers=2)
    assert not two.use_gpu and "2 workers" in two.notice and "the cluster has 1" in two.notice
    assert not shares((4, 1), num_workers=2, use_gpu=False).notice
    growing = shares((4, 1), num_workers=2, use_gpu=True, may_grow=True)
    assert growing.use_gpu and "wait" in growing.notice
    with pytest.raises(UserError, match=r"--use-gpu .*2 workers .* has 1"):
        shares((4, 1), num_workers=2, use_gpu=True)


def test_workers_leave_cpus_for_decoding() -> None:
    with pytest.raises(UserError, match="--cpus-per-worker"):
        shares((4, 0), num_workers=2, cpus_per_worker=2.0)
    assert shares((4, 0), num_workers=2, cpus_per_worker=2.0, may_grow=True).cpus_per_worker == 2.0


@pytest.mark.parametrize("nodes", [(), ((0, 0),)], ids=["no node", "a head without CPUs"])
def test_a_cluster_that_grows_from_zero(nodes: tuple[tuple[float, float], ...]) -> None:
    guessed = shares(*nodes, may_grow=True, num_workers=4)
    assert (guessed.use_gpu, guessed.cpus_per_worker, guessed.cpus_per_task) == (False, 1.0, 1.0)
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

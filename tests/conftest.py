"""Fixtures that all tests share: real pictures, small generated tables, one Ray cluster, a private HOME."""

import functools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Before anything asks for them: no test may touch the user's home or a cluster that happens to run.
_HOME = tempfile.mkdtemp(prefix="raydet-home-")
os.environ |= {"HOME": _HOME, "HF_HOME": f"{_HOME}/hf", "HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0"}
os.environ.pop("RAY_ADDRESS", None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begins with those that need Ray where there are several processes, since they take the longest."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: _process_group(item.nodeid) != "ray")


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Has `pytest -n` run the tests of a file in one process, and all files that need the Ray cluster in the same."""
    from xdist.scheduler import LoadScopeScheduling

    class _ByRay(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return _process_group(nodeid)

    return _ByRay(config, log)


@functools.cache
def _process_group_of_file(path: str) -> str:
    return "ray" if "ray_cluster" in Path(__file__).parents[1].joinpath(path).read_text("utf-8") else path


def _process_group(nodeid: str) -> str:
    return _process_group_of_file(nodeid.partition("::")[0])


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real pictures and annotations; see its README."""
    folder = Path(os.environ.get("RAYDET_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no test data in {folder}; set RAYDET_TEST_DATA to its folder")
    return folder


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Generated pictures with labels: images tables `train` (24 rows) and `val` (10 rows) of 64 × 64 pixels."""
    from raydet import PrepareShapesConfig, prepare_shapes

    folder = tmp_path_factory.mktemp("shapes")
    prepare_shapes(PrepareShapesConfig(out=str(folder), num_train=24, num_val=10, image_size=64, max_shapes=3))
    return folder


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A Ray cluster of this process's own, with two CPUs, for all tests that need one."""
    import ray

    # A short path: the names of Unix sockets are limited to about a hundred characters.
    with tempfile.TemporaryDirectory(prefix="rdt", ignore_cleanup_errors=True) as folder:
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            _temp_dir=folder,
            _node_ip_address="127.0.0.1",
            object_store_memory=512 * 2**20,
        )
        yield
        ray.shutdown()

"""Fixtures that all tests share: real pictures, small generated tables, one Ray cluster, a private HOME."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before anything asks for them: no test may touch the user's home or a cluster that happens to run.
_HOME = tempfile.mkdtemp(prefix="raydet-home-")
os.environ |= {"HOME": _HOME, "HF_HOME": f"{_HOME}/hf", "HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0"}
os.environ.pop("RAY_ADDRESS", None)


def pytest_itemcollected(item: pytest.Item) -> None:
    """Says which tests `pytest -n` runs in one process: those of a file, or all that need a Ray cluster."""
    item.add_marker(pytest.mark.xdist_group("ray" if _needs_ray(item) else item.path.stem))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begins with those that need Ray where there are several processes, since they take the longest."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: not _needs_ray(item))


def _needs_ray(item: pytest.Item) -> bool:
    return "ray_cluster" in getattr(item, "fixturenames", ())


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

"""Fixtures shared by all tests: real images, small generated tables, one Ray cluster, a private HOME."""

import atexit
import functools
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Set before any import reads them: no test may touch the user's home or a running cluster.
_HOME = tempfile.mkdtemp(prefix="raydet-home-")
os.environ |= {"HOME": _HOME, "HF_HOME": f"{_HOME}/hf", "HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0"}
os.environ.pop("RAY_ADDRESS", None)
# A shell starts background jobs with Ctrl-C ignored, which tests of interrupts and their child processes would inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@atexit.register
def _remove_home(owner: int = os.getpid()) -> None:
    if os.getpid() == owner:  # not in forked children
        shutil.rmtree(_HOME, ignore_errors=True)


_INTEGRATION_TESTS = (
    "tests/benchmarks/",
    "tests/cli/test_output_guard.py",
    "tests/engines/",
    "tests/exports/test_onnx.py",
    "tests/measuring/test_coco_ap",
    "tests/models/",
    "tests/scoring/test_pictures.py",
    "tests/training/test_trainer.py",
)


@pytest.hookimpl(tryfirst=True)  # before the marks select tests
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by what they need, and run those on Ray first under xdist."""
    for item in items:
        if "ray_cluster" in getattr(item, "fixturenames", ()):
            item.add_marker("ray")
        if item.nodeid.startswith(_INTEGRATION_TESTS):
            item.add_marker("integration")
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: _process_group(item.nodeid) != "ray")


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Make `pytest -n` run each test file in one process, and all files that need the Ray cluster in the same one."""
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


TEST_DATA = Path(os.environ.get("RAYDET_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
_NO_TEST_DATA = "no real images"


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Folder of real images and annotations; see its README."""
    if not TEST_DATA.is_dir():
        pytest.skip(f"{_NO_TEST_DATA} in {TEST_DATA}; set RAYDET_TEST_DATA to their folder")
    return TEST_DATA


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Report the number of skipped tests on real images and the reason."""
    skipped = [report for report in terminalreporter.stats.get("skipped", []) if _NO_TEST_DATA in str(report.longrepr)]
    if skipped:
        terminalreporter.write_line(
            f"{len(skipped)} tests on real images were skipped: there is no folder {TEST_DATA}; "
            "set RAYDET_TEST_DATA to the folder"
        )


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Generated images with labels: images tables `train` (24 rows) and `val` (10 rows) of 64 × 64 pixels."""
    from raydet import PrepareShapesConfig, prepare_shapes

    folder = tmp_path_factory.mktemp("shapes")
    prepare_shapes(PrepareShapesConfig(out=str(folder), num_train=24, num_val=10, image_size=64, max_shapes=3))
    return folder


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A private Ray cluster with two CPUs, shared by all tests of this process."""
    import ray

    # A short path, because names of Unix sockets are limited to about 100 characters.
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


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """URI of an empty bucket on a stand-in for S3."""
    from tests import s3_stand_in

    with s3_stand_in.started() as stand_in:
        stand_in.use(monkeypatch)
        yield s3_stand_in.BUCKET


@pytest.fixture
def quick_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases on outputs in an object store settle at once, because no other run starts at the same moment."""
    from raydet.tables import folder_lock

    monkeypatch.setattr(folder_lock, "LeaseTimes", functools.partial(folder_lock.LeaseTimes, settle_s=0.0))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread for torch: results are reproducible, and tiny models are faster without thread synchronisation."""
    import torch

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)

"""Files below a folder of an object store: complete, in order, listed in parallel, without a Python object for each."""

import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from pyarrow import fs as pafs

from raydet.common.errors import UserError
from raydet.images.collection import open_collection
from raydet.images.remote_listing import files_below
from raydet.tables import storage
from tests.simulated_store import SimulatedStore


def _files(root: Path, min_folders: int) -> list[str]:
    arrays = files_below(pafs.LocalFileSystem(), str(root), min_folders=min_folders)
    return [path for array in arrays for path in array.to_pylist()]


@pytest.mark.parametrize("seed", range(6))
def test_all_files_are_listed_in_the_order_of_their_paths(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    names = ["a", "a-", "a0", "a.jpg", "b", "é", "z!"]
    for _ in range(120):
        path = tmp_path.joinpath(*rng.choice(names, size=rng.integers(1, 5)))
        if not path.exists() and not any(parent.is_file() for parent in path.parents):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    (tmp_path / "empty" / "below").mkdir(parents=True)
    expected = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert len(expected) > 20
    for min_folders in (1, 3, 10, 1000):
        assert _files(tmp_path, min_folders) == expected
    assert _files(tmp_path / "absent", 3) == []


def _simulate(monkeypatch: pytest.MonkeyPatch, store: SimulatedStore) -> None:
    resolve = storage.resolve
    filesystem = pafs.PyFileSystem(store)
    monkeypatch.setattr(
        storage,
        "resolve",
        lambda uri: (filesystem, uri.removeprefix("sim://")) if uri.startswith("sim://") else resolve(uri),
    )


def test_prefixes_are_listed_in_parallel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Store(SimulatedStore):
        num_running = most_running = 0
        lock = threading.Lock()

        def _shard(self, shard: str) -> list[pafs.FileInfo]:
            with self.lock:
                self.num_running += 1
                self.most_running = max(self.most_running, self.num_running)
            time.sleep(0.01)
            found = super()._shard(shard)
            with self.lock:
                self.num_running -= 1
            return found

    store = Store(64, 3)
    _simulate(monkeypatch, store)
    images = open_collection("sim://bucket/images", index_uri=str(tmp_path / "index"))
    assert store.most_running >= 8
    assert store.num_requests == 65, "each folder is listed once"
    rows = pq.read_table(str(tmp_path / "index"))
    paths = [f"{shard:05d}/{number:06d}.jpg" for shard in range(64) for number in range(3)]
    assert (images.num_rows, rows["path"].to_pylist()) == (192, paths)
    assert rows["uri"].to_pylist() == [f"sim://bucket/images/{path}" for path in paths]
    assert rows["image_id"].to_pylist() == list(range(192))


def test_memory_does_not_grow_with_the_number_of_keys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    peaks = []
    for num_shards in (1500, 6000):
        _simulate(monkeypatch, SimulatedStore(num_shards, 20))
        tracemalloc.start()
        images = open_collection("sim://bucket/images", index_uri=str(tmp_path / f"index-{num_shards}"))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert images.num_rows == 20 * num_shards
    # Each folder still has its name in memory: about a hundred bytes, for the twenty images in it.
    assert peaks[1] - peaks[0] < 4500 * 1000


def test_a_store_without_images_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _simulate(monkeypatch, SimulatedStore(3, 0))
    with pytest.raises(UserError, match=r"no image file below sim://bucket/images \(3 other"):
        open_collection("sim://bucket/images", index_uri=str(tmp_path / "out" / "index"))
    assert not (tmp_path / "out").exists()

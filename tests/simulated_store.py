"""An object store that makes up its keys while they are listed, so that millions of them occupy no memory."""

import time
from typing import Any

from pyarrow import fs as pafs

_PAGE_KEYS = 1000


class SimulatedStore(pafs.FileSystemHandler):  # type: ignore[misc]  # pyarrow has no types
    """A bucket with the keys `images/SHARD/NUMBER.jpg` and, in each shard, `notes.txt`.

    Attributes:
        num_requests: Pages listed so far.
    """

    def __init__(self, num_shards: int, images_per_shard: int, *, page_s: float = 0.0) -> None:
        self.num_shards, self.images_per_shard, self._page_s = num_shards, images_per_shard, page_s
        self.num_requests = 0

    def get_type_name(self) -> str:
        return "simulated"

    def get_file_info(self, paths: list[str]) -> list[pafs.FileInfo]:
        folders = ("bucket", "bucket/images")
        return [
            pafs.FileInfo(path, pafs.FileType.Directory if path in folders else pafs.FileType.NotFound)
            for path in paths
        ]

    def get_file_info_selector(self, selector: pafs.FileSelector) -> list[pafs.FileInfo]:
        parts = selector.base_dir.split("/")
        if parts == ["bucket", "images"]:
            shards = [f"{number:05d}" for number in range(self.num_shards)]
            self._wait(len(shards))
            found = [pafs.FileInfo(f"bucket/images/{shard}", pafs.FileType.Directory) for shard in shards]
            return found + [info for shard in shards if selector.recursive for info in self._shard(shard)]
        return self._shard(parts[2])

    def _shard(self, shard: str) -> list[pafs.FileInfo]:
        self._wait(self.images_per_shard + 1)
        names = [f"{number:06d}.jpg" for number in range(self.images_per_shard)]
        return [pafs.FileInfo(f"bucket/images/{shard}/{name}", pafs.FileType.File) for name in [*names, "notes.txt"]]

    def _wait(self, num_keys: int) -> None:
        for _ in range(-(-num_keys // _PAGE_KEYS)):
            self.num_requests += 1
            time.sleep(self._page_s)

    def normalize_path(self, path: str) -> str:
        return path

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("only listing is simulated")

    open_input_stream = open_input_file = open_output_stream = open_append_stream = _refuse
    create_dir = delete_dir = delete_dir_contents = delete_root_dir_contents = delete_file = move = copy_file = _refuse

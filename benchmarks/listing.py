"""Speed and memory of listing a large folder of a simulated object store: raydet and a plain listing.

Each contestant runs in a separate process. The store makes up its keys, in folders of 5,000, and waits for each page of
1,000 keys as long as S3 takes. `raydet` lists folders in parallel and writes the index of a collection. `plain` lists
everything in one go with pyarrow, as a script would, and keeps a sorted list of strings; it writes nothing.

    python benchmarks/listing.py [--quick] [--keys 10000000] [--page-ms 20] [--contestants raydet plain]
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pyarrow import fs as pafs

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for tests.simulated_store

from tests.simulated_store import SimulatedStore

if TYPE_CHECKING:
    from benchmarks.contest import print_results, run_rounds
else:  # a script imports its neighbours without the package name
    from contest import print_results, run_rounds

KEYS_PER_FOLDER = 5000


def raydet(store: SimulatedStore, folder: Path) -> int:
    from raydet.images.collection import open_collection
    from raydet.tables import storage

    resolve = storage.resolve
    filesystem = pafs.PyFileSystem(store)
    storage.resolve = lambda uri: (filesystem, uri.removeprefix("sim://")) if uri.startswith("sim://") else resolve(uri)
    return open_collection("sim://bucket/images", index_uri=str(folder / "index.parquet")).num_rows


def plain(store: SimulatedStore, folder: Path) -> int:
    selector = pafs.FileSelector("bucket/images", recursive=True)
    infos = pafs.PyFileSystem(store).get_file_info(selector)
    return len(sorted(info.path for info in infos if info.is_file and info.path.endswith(".jpg")))


CONTESTANTS: dict[str, Callable[[SimulatedStore, Path], int]] = {"raydet": raydet, "plain": plain}


def run_child(name: str, setting: dict[str, float], folder: Path) -> None:
    store = SimulatedStore(int(setting["keys"]) // KEYS_PER_FOLDER, KEYS_PER_FOLDER, page_s=setting["page_ms"] / 1000)
    started = time.perf_counter()
    num_images = CONTESTANTS[name](store, folder)
    seconds = time.perf_counter() - started
    print(json.dumps({"images_per_s": num_images / seconds}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="500,000 keys")
    parser.add_argument("--keys", type=int, default=10_000_000)
    parser.add_argument("--page-ms", type=float, default=20)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        run_child(args.contestants[0], args.child, Path(args.child["folder"]))
        return
    with tempfile.TemporaryDirectory() as folder:
        setting = {"keys": 500_000 if args.quick else args.keys, "page_ms": args.page_ms, "folder": folder}
        runs = run_rounds(__file__, args.contestants, setting, rounds=args.rounds)
    print_results(runs, [("raydet", "plain", 0.0)])


if __name__ == "__main__":
    main()

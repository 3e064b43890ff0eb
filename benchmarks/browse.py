"""Time of `browse` over a million images: opening, the first page, filters, orders and scrolling.

    python benchmarks/browse.py [--quick] [--rounds 5]

The detections table has a row for each image and three detections a row; the images table names a few tiny files, once
with labels and once without. Requests go to the real server over a socket; the first page is everything that a browser
asks for until the first screen of thumbnails is complete, six requests at a time, as browsers do.
"""

import argparse
import http.client
import json
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
import psutil
import pyarrow as pa
from PIL import Image

if TYPE_CHECKING:
    from benchmarks.generated_boxes import CATEGORIES, generate, write_tables
else:  # a script imports its neighbours without the package name
    from generated_boxes import CATEGORIES, generate, write_tables

from raydet.browsing.app import application
from raydet.browsing.index import build_index
from raydet.browsing.queries import Queries
from raydet.browsing.serving import serving
from raydet.browsing.sources import open_sources
from raydet.config import BrowseConfig
from raydet.tables.schema import IMAGE_TYPE, OBJECTS_TYPE, build_schema
from raydet.tables.table import TableWriter, open_table

_AT_ONCE = 6
_NUM_FILES = 16
_ON_SCREEN = 40
_ASSETS = ("style.css", "app.js", "boxes.js", "filters.js", "grid.js", "state.js", "viewer.js", "icon.svg")
_Filters = dict[str, Callable[[int], dict[str, Any]]]
_FILTERS: _Filters = {
    "class": lambda number: {"classes": [number]},
    "score": lambda number: {"scores": [0.5, 0.6 + number / 100]},
    "class, score and size": lambda number: {"classes": [number, 40], "scores": [0.3, 1.0], "sizes": [1]},
    "class and path": lambda number: {"classes": [10 + number], "text": f"picture {number}"},
    "path": lambda number: {"text": f"picture {number}."},
}
"""Filters by the number of the round: each round asks for something else, so that no answer is remembered."""
_JUDGED: _Filters = {
    "false positives": lambda number: {"outcomes": [2], "scores": [0.3 + number / 100, 1.0]},
    "missed": lambda number: {"outcomes": [4], "classes": list(range(20 + number))},
    "kind of error": lambda number: {"errors": [1 + number % 5]},
    "crowding": lambda number: {"groups": [[0, number % 2]], "outcomes": [2 + number % 3]},
}


def main() -> None:
    """Measure detections alone, and detections with labels."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="100,000 images instead of a million")
    options = parser.parse_args()
    num_images = 100_000 if options.quick else 1_000_000
    summary: dict[str, Any] = {"num_images": num_images, "cpu_load_before": psutil.cpu_percent(interval=2) / 100}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write(folder, num_images)
        for kind, labels in (("detections", "unlabelled"), ("with_labels", "labelled")):
            config = BrowseConfig(data=str(folder / "detections"), images=str(folder / labels))
            summary[kind] = _measure(config, options.rounds, is_judged=kind == "with_labels")
    print(json.dumps(summary))


def _write(folder: Path, num_images: int) -> None:
    (folder / "files").mkdir()
    for number in range(_NUM_FILES):
        pixels = np.random.default_rng(number).integers(0, 256, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "files" / f"picture {number}.jpg")
    part = min(100_000, num_images)
    firsts = range(0, num_images, part)
    write_tables((generate(part, part * 2, part * 3, seed=first, first_id=first) for first in firsts), folder)
    files = pa.array([str(folder / "files" / f"picture {number}.jpg") for number in range(_NUM_FILES)])
    for name in ("labelled", "unlabelled"):
        schema = build_schema("images", CATEGORIES if name == "labelled" else ())
        with TableWriter(str(folder / name), schema, config_hash="generated") as writer:
            for batch in open_table(str(folder / "truth"), "images").iter_batches(batch_size=part):
                paths = files.take(pa.array(batch.column("image_id").to_numpy() % _NUM_FILES))
                columns = dict(zip(batch.schema.names, batch.columns, strict=True))
                fields = [pa.nulls(len(paths), pa.binary()), paths]
                columns["image"] = pa.StructArray.from_arrays(fields, fields=list(IMAGE_TYPE))
                if name == "unlabelled":
                    columns["objects"] = _no_objects(len(paths))
                writer.write(pa.RecordBatch.from_arrays([columns[one] for one in schema.names], schema=schema))


def _no_objects(count: int) -> pa.StructArray:
    starts = pa.array(np.zeros(count + 1, np.int32))
    lists = [pa.ListArray.from_arrays(starts, pa.array([], field.type.value_type)) for field in OBJECTS_TYPE]
    return pa.StructArray.from_arrays(lists, fields=list(OBJECTS_TYPE))


def _measure(config: BrowseConfig, rounds: int, *, is_judged: bool) -> dict[str, Any]:
    started = time.perf_counter()
    sources = open_sources(config)
    queries = Queries(build_index(sources))
    with serving(application(sources, queries, selection="selection")) as address:
        seconds = {"open": time.perf_counter() - started}
        client = _Client(address)
        seconds["first page"] = _timed(lambda: _load_page(client))
        for name, chosen in (_FILTERS | (_JUDGED if is_judged else {})).items():
            own = [_timed(partial(_filter, client, chosen(number))) for number in range(rounds)]
            seconds[f"filter: {name}"] = median(own)
        for sort in queries.sorts:
            seconds[f"order: {sort}"] = _timed(partial(client.post, "/api/page", {"sort": sort}))
        places = np.random.default_rng(0).integers(0, 99_000, rounds).tolist()
        seconds["scroll"] = median(_timed(partial(_scroll, client, place)) for place in places)
    for name, value in seconds.items():
        print(f"{'labelled' if is_judged else 'plain':>8}  {name:<32} {value:7.3f} s")
    slowest = {
        f"slowest_{kind}_s": round(max(value for name, value in seconds.items() if name.startswith(kind)), 3)
        for kind in ("filter", "order")
    }
    return {
        "boxes": queries.index.num_boxes,
        **slowest,
        "rss_mb": round(psutil.Process().memory_info().rss / 1e6),
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
    }


class _Client:
    """A visitor with the cookie; each request has a connection of its own, as the slowest browsers do."""

    def __init__(self, address: str) -> None:
        self._host, self._first = urlsplit(address).netloc, urlsplit(address).path
        self._cookie = ""

    def enter(self) -> None:
        headers = self._ask("GET", self._first, None)[0]
        self._cookie = headers["set-cookie"].partition(";")[0]

    def get(self, path: str) -> bytes:
        return self._ask("GET", path, None)[1]

    def post(self, path: str, content: dict[str, Any]) -> Any:
        return json.loads(self._ask("POST", path, json.dumps(content).encode())[1])

    def _ask(self, method: str, path: str, body: bytes | None) -> tuple[http.client.HTTPMessage, bytes]:
        connection = http.client.HTTPConnection(self._host, timeout=120)
        headers = {"Cookie": self._cookie, "Content-Type": "application/json"}
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        content = response.read()
        connection.close()
        assert response.status == 200, content
        return response.headers, content


def _load_page(client: _Client) -> None:
    """Ask for what a browser asks for until the first screen is complete."""
    client.enter()
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(client.get, [f"/{name}" for name in _ASSETS]))
        client.get("/api/about")
        facets = pool.submit(client.post, "/api/facets", {})
        _show(client, pool, {"count": 60})
        facets.result()


def _filter(client: _Client, chosen: dict[str, Any]) -> None:
    """Ask for the counts and the first images of a filter, as the page does at once."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        facets = pool.submit(client.post, "/api/facets", chosen)
        client.post("/api/page", {"filter": chosen, "count": 60})
        facets.result()


def _scroll(client: _Client, place: int) -> None:
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        _show(client, pool, {"start": place, "count": 60})


def _show(client: _Client, pool: ThreadPoolExecutor, asked: dict[str, Any]) -> None:
    cards = client.post("/api/page", asked)["images"]
    list(pool.map(client.get, [f"/thumbnail/{card['image']}" for card in cards[:_ON_SCREEN]]))


def _timed(function: Callable[[], Any]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()

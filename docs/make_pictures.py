"""Make the pictures of README and docs from the results of `raydet demo`.

    raydet demo && python docs/make_pictures.py runs/demo

Run it in the folder in which the demo ran, so that the pages name the demo's files relative to it.

It needs Chromium, and the extras `browse` and `test`.
"""

import argparse
import io
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

import raydet
from raydet import BrowseConfig, InspectConfig, ReportConfig
from raydet.browsing.app import application
from raydet.browsing.index import build_index
from raydet.browsing.queries import Queries
from raydet.browsing.serving import serving
from raydet.browsing.sources import open_sources
from raydet.tables.table import open_table

PICTURES = Path(__file__).parent / "images"
SIZE = (1200, 760)
COLOURS = 160
NUM_DRAWN, DRAWN_SIDE = 4, 300


def main() -> None:
    """Write all pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path, help="folder of a finished demo")
    demo = parser.parse_args().demo
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        sys.exit("install Chromium first")
    PICTURES.mkdir(exist_ok=True)
    write("detections", drawn(demo))
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        report = raydet.report(ReportConfig(metrics=str(demo / "metrics"), out=f"{folder}/report.html"))
        write("report", shot(browser, Path(report.out).as_uri(), ".main-svg"))
        inspected = raydet.inspect(InspectConfig(data=str(demo / "data" / "train"), out=folder + "/inspect"))
        write("inspect", shot(browser, Path(inspected.page).as_uri(), ".main-svg"))
        sources = open_sources(BrowseConfig(data=str(demo / "metrics")))
        queries = Queries(build_index(sources))
        with serving(application(sources, queries, selection=f"{folder}/selection")) as address:
            write("browse", shot(browser, address, "img"))
        browser.close()


def drawn(demo: Path) -> Image.Image:
    """Return some validation images side by side, with the detections of at least 0.5."""
    model = raydet.load(str(demo / "checkpoint"))
    rows = open_table(str(demo / "data" / "val"), "images").read(["image", "objects"]).to_pylist()
    several = [row for row in rows if len(row["objects"]["id"]) > 1][:NUM_DRAWN]
    images = [Image.open(io.BytesIO(row["image"]["bytes"])).resize((DRAWN_SIDE, DRAWN_SIDE)) for row in several]
    pictures = [found.filter(score_threshold=0.5).draw() for found in model(images)]
    return side_by_side(pictures)


def side_by_side(pictures: Sequence[Image.Image]) -> Image.Image:
    """Join pictures of one size."""
    width, height = pictures[0].size
    joined = Image.new("RGB", (width * len(pictures), height))
    for place, picture in enumerate(pictures):
        joined.paste(picture, (place * width, 0))
    return joined


def shot(browser: Any, address: str, selector: str) -> Image.Image:
    """Return the upper part of a page, once something on it is there."""
    page = browser.new_page(viewport={"width": SIZE[0], "height": SIZE[1]})
    page.goto(address)
    page.wait_for_selector(selector, state="visible")
    page.wait_for_timeout(2000)  # charts are drawn one after the other
    picture = Image.open(io.BytesIO(page.screenshot()))
    page.close()
    return picture


def write(name: str, picture: Image.Image) -> None:
    """Write a picture with few colours, because it is part of the repository."""
    path = PICTURES / f"{name}.png"
    picture.convert("RGB").quantize(COLOURS).save(path, optimize=True)
    print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()

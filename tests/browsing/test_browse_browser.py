"""The page of `browse` in a real browser: it loads, scrolls, filters, obeys the keyboard, and shows names as text."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from raydet.browsing.app import application
from raydet.browsing.index import build_index
from raydet.browsing.queries import Queries
from raydet.browsing.serving import serving
from raydet.browsing.sources import open_sources
from raydet.config import BrowseConfig
from tests.browsing.made import EVIL, EVIL_PATHS, NAMES, write_two_runs
from tests.crops_tables import Rule, write_crops
from tests.reporting.test_report_browser import DESKTOP, PHONE, browser

__all__ = ["browser"]

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(240)]

NUM_IMAGES = 300
WIDE = (1400, 900)
LOADED = "[...document.images].every(one => one.complete)"
READABLE = "all => all.every(one => one.complete && one.naturalWidth > 0)"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_two_runs(tmp_path_factory.mktemp("browse"), NUM_IMAGES)


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    config = BrowseConfig(data=str(folder / "metrics"), run="a", second_run="b")
    sources = open_sources(config)
    with serving(application(sources, Queries(build_index(sources)), selection=str(folder / "selection"))) as address:
        yield address


class Visit:
    """An open page; a script in a name would open a dialog, and a blocked one would leave a message."""

    def __init__(self, browser: Any, address: str, size: tuple[int, int] = DESKTOP, scheme: str = "light") -> None:
        self.context = browser.new_context(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", self.refuse)
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(address)
        self.page.wait_for_selector("#facets .row", state="attached")
        self.settle()

    def refuse(self, dialog: Any) -> None:
        self.complaints.append(dialog.message)
        dialog.dismiss()

    def settle(self) -> None:
        """Wait until no answer and no picture is outstanding."""
        self.wait(f"document.getElementById('scroller').getAttribute('aria-busy') === 'false' && {LOADED}")

    def wait(self, script: str) -> None:
        """Wait until an expression is true; playwright's own function would need `eval`, which the page forbids."""
        ends = time.monotonic() + 30
        while not self.page.evaluate(script):
            assert time.monotonic() < ends, f"never true: {script}"
            self.page.wait_for_timeout(30)

    def counts(self) -> str:
        self.settle()
        text: str = self.page.locator("#counts").inner_text()
        return text

    def press(self, key: str) -> None:
        self.page.keyboard.press(key)

    def close(self) -> None:
        """Close the page; the only messages may be those about image 50, which is not a picture."""
        host = self.page.url.split("/")[2]
        assert [url for url in self.requests if url.split("/")[2] != host] == []
        assert [text for text in self.complaints if "404" not in text] == []
        self.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [WIDE, PHONE])
def test_it_loads_and_fits(browser: Any, address: str, size: Any, scheme: str) -> None:
    visit = Visit(browser, address, size, scheme)
    page = visit.page
    assert visit.counts().startswith(f"{NUM_IMAGES} images")
    assert page.evaluate("location.pathname") == "/", "the token stays out of the address bar"
    assert page.locator(".cell svg .box").count() > 10
    readable = page.locator(".cell:not(:has(.absent)) img")
    assert readable.count() > 5 and readable.evaluate_all(READABLE)
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= size[0], f"the page is {width} px wide in a window of {size[0]} px"
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(19, 21, 24)"
    assert dark is (scheme == "dark")
    if size == PHONE:
        assert not page.locator("#filters").is_visible()
        page.locator("#show-filters").click()
        assert page.locator("#filters").is_visible()
        page.locator("#show-filters").click()
    page.locator(".cell .picture").first.click()
    page.wait_for_selector("#viewer[open] .box")
    assert page.locator("#stages figure").count() == 2
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
    visit.close()


def test_scrolling_loads_what_comes_and_drops_what_went(browser: Any, address: str) -> None:
    visit = Visit(browser, address)
    page = visit.page
    first = page.locator("[aria-label^='Open image 0,']")
    assert first.count() == 1 and page.locator(".cell").count() < 100
    page.evaluate("document.getElementById('scroller').scrollTo(0, 1e9)")
    page.wait_for_selector(f"[aria-label^='Open image {10 * (NUM_IMAGES - 1)}']")
    visit.settle()
    assert page.locator(".cell").count() < 100 and first.count() == 0
    assert page.locator(".cell img").evaluate_all(READABLE)
    visit.close()


def test_filters_change_counts_histograms_and_images(browser: Any, address: str) -> None:
    visit = Visit(browser, address)
    page = visit.page
    everything = visit.counts()
    page.locator("#facets .row", has_text="false").first.click()
    some = visit.counts()
    assert some != everything and f"of {NUM_IMAGES}" in some
    number = page.locator("[data-key='outcomes 2'] .number").inner_text()
    assert some.endswith(f"{number} boxes")
    assert page.locator(".cell svg .box.faint").count() > 0
    page.get_by_label("Only boxes that pass the filter").check()
    assert page.locator(".cell svg .box:not(.false)").count() == 0 < page.locator(".cell svg .box.false").count()
    page.locator(".histogram button").nth(8).click()
    assert visit.counts() != some and page.locator(".chip").count() == 3  # with "Clear all"
    page.reload()
    page.wait_for_selector(".chip")
    assert page.locator(".chip").count() == 3, "a reloaded page keeps the filter"
    page.get_by_role("button", name="Clear all").click()
    assert visit.counts() == everything
    page.locator("#text").fill("picture 001")
    page.wait_for_selector(".chip")
    assert visit.counts().startswith("10 of ")
    page.locator("#text").fill("no such path")
    visit.wait("document.getElementById('counts').textContent.startsWith('0 of')")
    visit.settle()
    assert page.locator(".cell").count() == 0
    visit.close()


def test_orders_put_the_worst_first(browser: Any, address: str) -> None:
    visit = Visit(browser, address)
    page = visit.page
    page.locator("#sort").select_option(label="Lowest F1")
    visit.settle()
    visit.wait("document.querySelectorAll('.cell small').length > 5")
    words = [text.split() for text in page.locator(".cell small").all_inner_texts()]
    values = [float(of_image[1]) for of_image in words if of_image[0] == "F1"]
    assert values == sorted(values) and values[0] == 0
    visit.close()


def test_the_keyboard_moves_opens_selects_and_switches_boxes(browser: Any, address: str, folder: Path) -> None:
    visit = Visit(browser, address)
    page = visit.page
    visit.press("ArrowRight")
    visit.press("ArrowRight")
    visit.press("ArrowDown")
    focused = "document.activeElement.getAttribute('aria-label')"
    below = page.evaluate(focused)
    assert below.startswith("Open image ") and "image 20" not in below
    visit.press("ArrowUp")
    assert page.evaluate(focused).startswith("Open image 20")
    visit.press("x")
    page.wait_for_selector(".cell.selected")
    assert page.locator("#num-selected").inner_text() == "1 image selected"
    visit.press("Enter")
    page.wait_for_selector("#viewer[open]")
    page.wait_for_selector("#stages .box")
    title = page.locator("#viewer-title").inner_text()
    assert page.locator("#viewer-selected").is_checked()
    shown = page.locator("#stages .box").count()
    visit.press("l")
    assert 0 < page.locator("#stages .box").count() < shown
    assert page.locator("#stages .box.label, #stages .box.missed").count() == 0
    visit.press("h")
    assert page.locator("#stages .box").count() == 0
    visit.press("h")
    visit.press("l")
    assert page.locator("#stages .box").count() == shown
    visit.press("ArrowRight")
    visit.wait(f"document.getElementById('viewer-title').textContent !== {title!r}")
    visit.wait("[...document.querySelectorAll('#stages img')].every((one) => one.complete && one.naturalWidth)")
    visit.settle()
    visit.press("+")
    inner = "[...document.querySelectorAll('#stages .inner')]"
    visit.wait(f"{inner}.some((one) => one.clientWidth > one.parentElement.clientWidth)")
    visit.press("Escape")
    # The browser tells of a closed dialog a moment later.
    visit.wait("(document.activeElement.getAttribute('aria-label') ?? '').startsWith('Open image 30')")
    assert not page.locator("#viewer").is_visible()
    visit.press("?")
    assert page.locator("#help").is_visible()
    visit.press("Escape")
    page.get_by_role("button", name="Save selection").click()
    visit.wait("document.getElementById('message').textContent.includes('selection.parquet')")
    assert pq.read_table(folder / "selection.parquet")["image_id"].to_pylist() == [20]
    page.get_by_role("button", name="Clear selection").click()
    visit.wait("document.getElementById('num-selected').textContent === ''")
    visit.close()


def test_boxes_are_switched_by_class_and_score(browser: Any, address: str) -> None:
    visit = Visit(browser, address)
    page = visit.page
    page.locator("#sort").select_option(label="Most boxes")
    visit.settle()
    page.locator(".cell .picture").first.click()
    page.wait_for_selector("#viewer-classes:not([hidden]) input")
    judged = float(page.locator("#viewer-score").input_value())
    assert 0 < judged < 1, "the page first shows the boxes that are judged"
    page.locator("#viewer-score").fill("0")
    visit.settle()
    shown = page.locator("#stages .box").count()
    page.locator("#viewer-classes input").first.uncheck()
    fewer = page.locator("#stages .box").count()
    assert 0 < fewer < shown
    page.locator("#viewer-classes input").first.check()
    page.locator("#viewer-score").fill("0.6")
    visit.settle()
    scores = [text.split()[-1] for text in page.locator(".entry > span").all_inner_texts()]
    assert all(float(score) >= 0.6 for score in scores if score.replace(".", "").isdigit())
    assert page.locator("#stages .box").count() < shown
    page.locator(".entry").first.hover()
    assert page.locator("#stages .box.pointed").count() >= 1
    visit.close()


def test_names_stay_text_wherever_they_stand(browser: Any, address: str) -> None:
    visit = Visit(browser, address)
    page = visit.page
    names = page.locator("[data-key^='classes '] .name").all_inner_texts()
    assert sorted(names) == sorted(NAMES)
    page.locator("[data-key^='classes ']", has_text=EVIL).click()
    visit.settle()
    assert page.locator(".chip", has_text=EVIL).count() == 1
    page.locator(".chip").click()
    visit.settle()
    assert page.locator(".row", has_text="<i>rear</i>").count() == 1
    for number, path in enumerate(EVIL_PATHS):
        page.locator(".cell .picture").nth(number).click()
        page.wait_for_selector("#viewer[open]")
        visit.wait("document.querySelectorAll('#stages svg').length === 2")
        visit.settle()
        assert page.locator("#viewer-title").text_content() == path
        visit.press("Escape")
    assert page.locator("script").count() == 1 and page.locator("#grid script, #grid iframe, #facets img").count() == 0
    visit.close()


@pytest.mark.parametrize("size", [WIDE, PHONE])
def test_answers_are_filtered_by_and_shown_beside_boxes(
    browser: Any, folder: Path, tmp_path: Path, size: tuple[int, int]
) -> None:
    rules: dict[str, Rule] = {
        "answer_1": lambda image, place: f"{EVIL} {image // 10 % 12}" if place == 0 else None,
        "depth": lambda image, place: image + place / 10,
    }
    crops = write_crops(tmp_path / "crops", str(folder / "a"), rules, ask=["What <i>colour</i>?"])
    sources = open_sources(BrowseConfig(data=str(folder / "metrics"), run="a", crops=[crops]))
    with serving(application(sources, Queries(build_index(sources)), selection=str(tmp_path / "chosen"))) as address:
        visit = Visit(browser, address, size)
        page = visit.page
        if size == PHONE:
            page.locator("#show-filters").click()
        assert page.locator("summary", has_text="What <i>colour</i>?").count() == 1
        assert page.locator("[data-key='answer text 1']").count() == 0, "numbers are not searched by their text"
        ranges = page.locator("[data-key^='answer 1 '] .name").all_inner_texts()
        assert len(ranges) == 4 and ranges == sorted(ranges, key=lambda text: float(text.split()[0]))
        page.locator("[data-key='answer text 0']").fill(f"{EVIL} 11")
        visit.press("Enter")
        visit.wait("document.querySelectorAll(\"[data-key^='answer 0 ']\").length === 1")
        page.locator("[data-key^='answer 0 ']").click()
        visit.wait("document.querySelectorAll('.chip:not(.clear)').length === 2")
        number = int(page.locator("[data-key^='answer 0 '] .number").inner_text())
        assert visit.counts() == f"{number} of {NUM_IMAGES} images · {number} boxes"
        page.reload()
        visit.wait("document.querySelectorAll('.chip:not(.clear)').length === 2")
        visit.settle()
        page.locator(".cell .picture").first.click()
        page.wait_for_selector("#viewer[open] .entry .answer")
        answers = page.locator(".entry .answer").all_inner_texts()
        assert f"What <i>colour</i>? {EVIL} 11" in answers and any(text.startswith("depth ") for text in answers)
        labels = page.locator("#stages text").all_text_contents()
        assert any(" · " in text for text in labels) or len(page.locator("#stages .box").all()) > 12
        assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
        visit.close()


def test_another_page_cannot_read_or_change_anything(browser: Any, address: str) -> None:
    """A page from elsewhere, in the browser that holds the cookie, gets nothing from the server."""
    visit = Visit(browser, address)
    host = address.rpartition("/")[0]
    other = visit.context.new_page()
    other.goto("data:text/html,<title>elsewhere</title>")
    script = """async (host) => {
      const ask = (path, options) => fetch(host + path, options).then((answer) => answer.status, () => "blocked");
      const post = { method: "POST", credentials: "include", body: "{}", mode: "no-cors" };
      const image = new Image();
      image.src = host + "/thumbnail/0";
      const shown = await image.decode().then(() => "shown", () => "blocked");
      return [await ask("/api/about", { credentials: "include" }), await ask("/api/save", post), shown];
    }"""
    assert other.evaluate(script, host) in (["blocked", 0, "blocked"], ["blocked", "blocked", "blocked"])
    other.close()
    visit.close()

"""The report in a real browser: it draws, sorts, switches and fits a phone, without errors or requests."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from raydet.config import ReportConfig
from raydet.reporting.report import report
from tests.reporting.test_reporting import EVIL, write_all

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (the extra `test`)")

pytestmark = [pytest.mark.browser, pytest.mark.slow]

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DESKTOP, PHONE = (1280, 900), (390, 844)


@dataclass
class Visit:
    """Open page with its console messages and requests."""

    page: Any
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    metrics = write_all(tmp_path_factory.mktemp("report"))
    return Path(report(ReportConfig(metrics=str(metrics))).out).as_uri()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no browser: install Debian's chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def visit(browser: Any, address: str, size: tuple[int, int] = DESKTOP, scheme: str = "light") -> Visit:
    page = browser.new_page(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
    seen = Visit(page)
    page.on("console", lambda message: seen.complaints.append(message.text) if message.type != "log" else None)
    page.on("pageerror", lambda error: seen.complaints.append(str(error)))
    page.on("request", lambda request: seen.requests.append(request.url))
    page.goto(address)
    page.wait_for_selector(".main-svg", state="attached")
    return seen


def draw_everything(page: Any) -> int:
    """Wait until all charts are drawn, without scrolling to them, and return their number."""
    ids: list[str] = page.eval_on_selector_all(".chart", "all => all.map(one => one.id)")
    for chart in ids:
        page.wait_for_selector(f"#{chart} .main-svg", state="attached")
    return len(ids)


def check_page(browser: Any, address: str, size: Any, scheme: str, *, num_charts: int) -> None:
    """Draw a page in a window of the given size; check for console messages, requests and horizontal overflow.

    A script in a name or path would open a dialog, which playwright reports as an error.
    """
    seen = visit(browser, address, size, scheme)
    assert draw_everything(seen.page) == num_charts
    assert seen.page.evaluate("document.documentElement.dataset.theme") == scheme
    width = seen.page.evaluate("document.documentElement.scrollWidth")
    assert width <= size[0], f"the page is {width} px wide in a window of {size[0]} px"
    assert seen.complaints == []
    assert [url for url in seen.requests if not url.startswith("data:")] == [address]
    seen.page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE])
def test_it_draws_without_error_or_request_and_fits(browser: Any, address: str, size: Any, scheme: str) -> None:
    check_page(browser, address, size, scheme, num_charts=5)


def test_the_table_sorts_by_button_and_filters(browser: Any, address: str) -> None:
    page = visit(browser, address).page

    def order() -> list[str]:
        names: list[str] = page.eval_on_selector_all(
            "#class-table tbody tr:not([hidden]) th", "all => all.map(one => one.textContent)"
        )
        return names

    header = page.locator("#class-table thead th").nth(1)
    before = order()
    header.get_by_role("button").focus()
    page.keyboard.press("Enter")
    assert header.get_attribute("aria-sort") == "descending" and order() == before
    page.keyboard.press("Enter")
    assert header.get_attribute("aria-sort") == "ascending"
    # The class without a value stays last.
    assert order() == [before[1], before[0], before[2]]
    page.locator("#filter").fill("CAT")
    assert order() == ["cat"] and page.locator("#filter-count").text_content() == "1 of 3 classes"
    page.close()


def test_a_class_can_be_switched_and_its_name_stays_text(browser: Any, address: str) -> None:
    seen = visit(browser, address)
    page = seen.page
    draw_everything(page)
    traces = "document.getElementById('chart-curves').data.map(trace => trace.y.length)"
    assert page.evaluate(traces) == [11, 11]
    page.locator("#curve-class").select_option(label=EVIL)
    assert page.evaluate(traces) == [11, 11]
    page.locator("#curve-class").select_option(index=3)
    assert "no curve" in page.locator("#chart-curves").inner_text()
    page.locator("#curve-class").select_option(index=1)
    page.wait_for_selector("#chart-curves .main-svg")
    labels = page.locator("#chart-confusion .ytick").all_text_contents()
    assert any(label.startswith("</script>") for label in labels)
    assert seen.complaints == []
    page.close()


def test_a_chart_says_its_values(browser: Any, address: str) -> None:
    page = visit(browser, address).page
    draw_everything(page)
    page.locator("#chart-curves").scroll_into_view_if_needed()
    box = page.locator("#chart-curves .nsewdrag").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + box["height"] * 0.26)
    page.wait_for_selector("#chart-curves .hovertext")
    assert "precision 0.750" in page.locator("#chart-curves .hovertext").first.text_content()
    page.close()


def test_tabs_and_theme_work_from_the_keyboard(browser: Any, address: str) -> None:
    page = visit(browser, address).page
    first, second = (page.get_by_role("tab").nth(number) for number in range(2))
    first.focus()
    page.keyboard.press("ArrowRight")
    assert second.get_attribute("aria-selected") == "true" and second.evaluate("one => one === document.activeElement")
    assert page.locator("#gallery-missed").is_visible() and not page.locator("#gallery-false").is_visible()
    page.get_by_role("button", name="Switch to dark colours").press("Enter")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(19, 21, 24)"
    page.close()


def test_on_paper_all_galleries_are_there(browser: Any, address: str) -> None:
    page = visit(browser, address).page
    page.emulate_media(media="print")
    assert page.locator("#gallery-suspects").is_visible() and not page.locator("nav").is_visible()
    page.close()


def test_a_picture_is_enlarged_by_click_and_key(browser: Any, address: str) -> None:
    seen = visit(browser, address)
    page, dialog = seen.page, seen.page.locator("#enlarged")
    picture = page.locator('.picture[role="button"]').first
    before = picture.bounding_box()["width"]
    picture.click()
    assert dialog.locator("svg").bounding_box()["width"] > 2 * before
    assert dialog.locator("figcaption").inner_text() == page.locator("figcaption").first.inner_text()
    page.keyboard.press("Escape")
    assert not dialog.is_visible()
    picture.press("Enter")
    dialog.get_by_role("button", name="Close").click()
    assert not dialog.is_visible() and seen.complaints == []
    page.close()


def test_a_table_shows_on_which_side_it_goes_on(browser: Any, address: str) -> None:
    page = visit(browser, address, PHONE).page
    table = page.get_by_role("region", name="Table of classes")
    assert table.get_attribute("data-more") == "right"
    table.evaluate("one => one.scrollTo(one.scrollWidth, 0)")
    page.wait_for_selector('[aria-label="Table of classes"][data-more=""]')
    page.close()

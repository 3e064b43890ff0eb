"""The inspection page in a real browser: it draws, switches classes, fits a phone, and makes no requests."""

from pathlib import Path
from typing import Any

import pytest

from raydet.config import InspectConfig
from raydet.inspection.inspect import inspect
from tests.inspection.test_inspect import image_row, picture_bytes, write
from tests.reporting.test_report_browser import DESKTOP, PHONE, browser, check_page, draw_everything, visit
from tests.reporting.test_reporting import EVIL

__all__ = ["browser"]

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(240)]

NAMES = ("cat", EVIL, "R&D <b>bold</b>")


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("inspect")
    boxes = [((10.0, 10.0, 40.0, 40.0), 0), ((60.0, 20.0, 30.0, 30.0), 1)]
    content = [image_row(number, boxes, data=picture_bytes(number)) for number in range(6)]
    content += [image_row(6, [((5.0, 5.0, 60.0, 60.0), 2)] * 2, data=picture_bytes(6)), image_row(7, [])]
    content[0]["image"]["path"] = f"/a very long path/{'x' * 200}/{EVIL}.png"
    data, val = write(folder / "data", content, NAMES), write(folder / "val", content[:3], NAMES)
    config = InspectConfig(data=data.uri, val_data=val.uri, out=str(folder / "out"), augmentation="flip", image_size=64)
    return Path(inspect(config).page).as_uri()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE])
def test_it_draws_without_error_or_request_and_fits(browser: Any, address: str, size: Any, scheme: str) -> None:
    check_page(browser, address, size, scheme, num_charts=8)


def test_names_stay_text_wherever_they_stand(browser: Any, address: str) -> None:
    page = browser.new_page()
    dialogs: list[str] = []
    page.on("dialog", lambda dialog: dialogs.append(dialog.message))
    page.goto(address)
    page.wait_for_selector(".main-svg", state="attached")
    draw_everything(page)
    names = page.eval_on_selector_all("#class-table tbody th", "all => all.map(one => one.textContent)")
    assert sorted(names) == sorted(NAMES) and dialogs == []
    labels = page.locator("#chart-together .ytick").all_text_contents()
    assert any(label.startswith("</script>") for label in labels)
    assert page.locator("script").count() == 4  # three of the page, and the unpacked chart library
    page.close()


def test_a_class_can_be_chosen_for_charts_and_for_pictures(browser: Any, address: str) -> None:
    page = visit(browser, address).page
    draw_everything(page)
    boxes = "document.getElementById('chart-box_side_px').data.map(trace => trace.y.reduce((a, b) => a + b, 0))"
    texts = "document.getElementById('chart-box_side_px').data[0].text.join(' ')"
    assert page.evaluate(boxes) == pytest.approx([1, 1])
    assert "2 boxes (100.0 %)" not in page.evaluate(texts)
    page.locator("#chart-class").select_option(index=3)
    assert "2 boxes (100.0 %)" in page.evaluate(texts)
    assert page.evaluate(boxes) == pytest.approx([1, 0])
    assert page.locator("#gallery-0").is_visible() and not page.locator("#gallery-1").is_visible()
    page.locator("#gallery-class").select_option(label=EVIL)
    assert page.locator("#gallery-1").is_visible() and not page.locator("#gallery-0").is_visible()
    assert page.locator("#gallery-1 image").count() == 12
    page.close()


def test_findings_open_and_the_table_of_classes_filters(browser: Any, address: str) -> None:
    page = visit(browser, address).page
    case = page.locator("#findings details").filter(has_text="Duplicate box")
    assert not case.locator("tbody").is_visible()
    case.locator("summary").click()
    assert "60 × 60 px at 5, 5" in case.locator("tbody").inner_text()
    page.locator("#filter").fill("r&d")
    assert page.locator("#filter-count").text_content() == "1 of 3 classes"
    page.close()

"""The tuning page in a real browser: it draws, fits a phone, keeps names as text, and makes no requests."""

from typing import Any

import pytest

from tests.reporting.test_report_browser import DESKTOP, PHONE, browser, check_page, draw_everything, visit
from tests.tuning.test_tune import evil_page

__all__ = ["browser"]

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("tune") / "tune.html"
    file.write_text(evil_page(), "utf-8")
    return file.as_uri()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE])
def test_it_draws_without_error_or_request_and_fits(browser: Any, address: str, size: Any, scheme: str) -> None:
    check_page(browser, address, size, scheme, num_charts=3)


def test_charts_show_what_was_measured(browser: Any, address: str) -> None:
    page = visit(browser, address).page
    draw_everything(page)
    best = "document.getElementById('chart-progress').data[0].y"
    assert page.evaluate(best) == pytest.approx([0.1, 0.2, 0.3])
    lines = "document.getElementById('chart-space').data.map(trace => trace.y)"
    expected = [[2 / 3, 0.75, 0], [1 / 3, 0.75, 0.5], [0, 0.75, 1]]
    assert page.evaluate(lines) == [pytest.approx(line, abs=1e-3) for line in expected]
    assert page.evaluate("document.getElementById('chart-importance').data[0].x") == pytest.approx([0.25, 0.75])
    page.close()

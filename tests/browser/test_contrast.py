"""The contrast of all text and of all shapes with a meaning, measured in Chromium on every page in both themes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import Page, expect

from tests.browser.made_up_cluster import KINDS, MadeUpCluster, in_every_state, without_services
from tests.browser.served_cluster import served
from tests.browser.test_looks_and_speed import PAGES
from tests.support.clients.browser import a_browser, a_page, open_place

pytestmark = pytest.mark.chromium

MEASURE = Path(__file__).with_name("contrast.js").read_text()
PHASES = ("running", "starting", "pending", "unhealthy", "stopping", "completed", "failed", "unknown")


def _places(cluster: MadeUpCluster) -> Iterator[str]:
    yield from PAGES
    for kind in KINDS:
        for id in list(cluster.rows[kind])[:8]:
            yield f"{kind}/{kind}/{id}"
    service, task = next(iter(cluster.rows["services"])), next(iter(cluster.rows["tasks"]))
    for tab in ("tasks", "logs", "history"):
        yield f"services/services/{service}/{tab}"
    yield f"tasks/tasks/{task}/terminal"
    yield "tasks/tasks/removed"


async def _measured(page: Page, url: str, place: str) -> None:
    await open_place(page, url, place)
    # Two frames, in which the hive is drawn.
    await page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    assert (place, await page.evaluate("contrastFindings()")) == (place, [])


@pytest.mark.slow
@pytest.mark.parametrize("theme", ["light", "dark"])
async def test_text_and_shapes_have_enough_contrast(theme: Any) -> None:
    """4.5:1 for text (3:1 if it is large) and 3:1 for shapes, also in the drawn hive."""
    cluster = in_every_state()
    options: dict[str, Any] = {"color_scheme": theme, "viewport": {"width": 1280, "height": 800}}
    async with served(cluster) as url, a_browser() as browser, a_page(browser, **options) as page:
        await page.add_init_script(MEASURE)
        await page.goto(url)
        await expect(page.locator(".live")).to_have_text("live")
        phases = (
            "[...new Set([...document.querySelectorAll('.legend .glyph')].map((one) => one.classList[1]))]"
        )
        assert set(PHASES) <= set(await page.evaluate(phases))
        for place in _places(cluster):
            await _measured(page, url, place)
        counts = await page.evaluate("contrastCounts()")
        assert counts["text"] > 2000
        assert counts["graphics"] > 2000
        assert counts["drawn"] > 500
        await page.goto(f"{url}#/hive")
        for key in ("?", "/"):
            await page.keyboard.press(key)
            await expect(page.get_by_role("dialog")).to_be_visible()
            await page.evaluate("Promise.all(document.getAnimations().map((one) => one.finished))")
            assert (key, await page.evaluate("contrastFindings()")) == (key, [])
            await page.keyboard.press("Escape")


@pytest.mark.slow
@pytest.mark.parametrize("theme", ["light", "dark"])
async def test_empty_pages_have_enough_contrast(theme: Any) -> None:
    async with (
        served(without_services(3)) as url,
        a_browser() as browser,
        a_page(browser, color_scheme=theme) as page,
    ):
        await page.add_init_script(MEASURE)
        await page.goto(url)
        for place in PAGES:
            await _measured(page, url, place)

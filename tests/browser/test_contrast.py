"""The contrast of all text and of all shapes with a meaning, measured in Chromium on every page in both themes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import Page, expect

from tests.browser.made_up_cluster import KINDS, MadeUpCluster, in_every_state, without_services
from tests.browser.served_cluster import app_of, served
from tests.browser.test_looks_and_speed import PAGES
from tests.support.clients.browser import a_browser, a_page, open_place
from tests.support.clients.dashboard_rig import Clock, a_dashboard_server
from tests.support.security.api_authority import an_authority

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
        await open_place(page, url, "hive")
        for key in ("?", "/"):
            await page.keyboard.press(key)
            await expect(page.get_by_role("dialog")).to_be_visible()
            await page.evaluate("Promise.all(document.getAnimations().map((one) => one.finished))")
            assert (key, await page.evaluate("contrastFindings()")) == (key, [])
            await page.keyboard.press("Escape")
            # The next key would go to the dialog that closes.
            await expect(page.get_by_role("dialog")).to_have_count(0)


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


@pytest.mark.slow
@pytest.mark.parametrize("theme", ["light", "dark"])
async def test_dialogs_banners_and_the_phone_have_enough_contrast(theme: Any) -> None:
    cluster = in_every_state()
    cluster.then = cluster.snapshot()
    service, node = next(iter(cluster.rows["services"])), list(cluster.rows["nodes"])[1]
    dialogs = (
        (f"services/services/{service}", "Scale", ".preview"),
        (f"services/services/{service}", "Update image", "code"),
        (f"services/services/{service}", "Restart", "p"),
        (f"nodes/nodes/{node}", "Drain", ".danger"),
        (f"nodes/nodes/{node}", "Demote", ".danger"),
    )
    async with (
        served(cluster) as url,
        a_browser() as browser,
        a_page(browser, color_scheme=theme, viewport={"width": 390, "height": 844}) as page,
    ):
        await page.add_init_script(MEASURE)
        for place, button, part in dialogs:
            await open_place(page, url, place)
            await page.get_by_role("button", name=button, exact=True).click()
            await expect(page.get_by_role("dialog").locator(part).first).to_be_visible()
            await page.evaluate("Promise.all(document.getAnimations().map((one) => one.finished))")
            assert (button, await page.evaluate("contrastFindings()")) == (button, [])
            await page.keyboard.press("Escape")
        await open_place(page, url, "hive")
        await page.get_by_role("button", name="More").click()
        await expect(page.locator(".foot")).to_be_visible()
        assert await page.evaluate("contrastFindings()") == []
        await expect(page.locator(".bars rect").first).to_be_attached()
        await page.locator(".bars input").fill("0")
        await expect(page.locator(".banner.past")).to_be_visible()
        await expect(page.locator(".attention")).to_be_visible()
        assert await page.evaluate("contrastFindings()") == []


@pytest.mark.parametrize("theme", ["light", "dark"])
async def test_the_login_page_has_enough_contrast(tmp_path: Path, theme: Any) -> None:
    authority, app = an_authority(tmp_path / "ca"), app_of(in_every_state(), "")
    async with (
        a_dashboard_server(app, authority, Clock()) as (port, _),
        a_browser("--ignore-certificate-errors") as browser,
        a_page(browser, color_scheme=theme, may_say="Failed to load resource") as page,
    ):
        await page.add_init_script(MEASURE)
        await page.goto(f"https://localhost:{port}/")
        assert await page.evaluate("contrastFindings()") == []
        await page.get_by_label("Token").fill("wrong")
        await page.keyboard.press("Enter")
        await expect(page.get_by_role("alert")).to_be_visible()
        assert await page.evaluate("contrastFindings()") == []
        assert (await page.evaluate("contrastCounts()"))["text"] > 5

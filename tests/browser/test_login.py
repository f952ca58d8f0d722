"""The dashboard of a manager's own listener in Chromium: its login, what follows, and its end."""

import os
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import Page, expect

from tests.browser.made_up_cluster import make
from tests.browser.served_cluster import app_of
from tests.browser.test_looks_and_speed import SIZES, findings
from tests.support.clients.browser import a_browser, a_page
from tests.support.clients.dashboard_rig import Clock, a_dashboard_server
from tests.support.security.api_authority import an_authority

pytestmark = pytest.mark.chromium


async def _log_in(page: Page, token: str) -> None:
    await page.get_by_label("Token").fill(token)
    await page.keyboard.press("Enter")


async def test_a_token_opens_the_dashboard_until_logging_out(tmp_path: Path) -> None:
    authority, app = an_authority(tmp_path / "ca"), app_of(make(3, 8), "")
    async with (
        a_dashboard_server(app, authority, Clock()) as (port, people),
        a_browser("--ignore-certificate-errors") as browser,
        a_page(browser, may_say="Failed to load resource") as page,
    ):
        address = f"https://localhost:{port}/"
        await page.goto(address)
        await _log_in(page, "<b>wrong</b>")
        await expect(page.get_by_role("alert")).to_contain_text("unknown or was revoked")
        await _log_in(page, "ann-token")
        await expect(page.locator(".live")).to_have_text("live")
        await expect(page.locator(".user")).to_have_text("ann viewer")
        assert await page.evaluate("document.cookie") == ""
        # Another tab is past the login already.
        other = await page.context.new_page()
        await other.goto(address)
        await expect(other.locator(".live")).to_have_text("live")
        await other.close()
        await page.get_by_role("button", name="Log out").click()
        await expect(page.get_by_label("Token")).to_be_visible()
        await _log_in(page, "ann-token")
        await expect(page.locator(".live")).to_have_text("live")
        people.revoke("ann-token")
        await expect(page.locator(".banner")).to_contain_text("log in again", timeout=20_000)
        await page.get_by_role("link", name="Log in").click()
        await expect(page.get_by_label("Token")).to_be_visible()


@pytest.mark.slow
@pytest.mark.parametrize("theme", ["light", "dark"])
async def test_the_login_page_is_well_made(theme: str, tmp_path: Path) -> None:
    place = Path(os.environ.get("SKEP_PICTURES", tmp_path))
    authority, app = an_authority(tmp_path / "ca"), app_of(make(5, 30), "")
    async with (
        a_dashboard_server(app, authority, Clock()) as (port, _),
        a_browser("--ignore-certificate-errors") as browser,
    ):
        for name, (width, height) in SIZES.items():
            options: Any = {"viewport": {"width": width, "height": height}, "color_scheme": theme}
            async with a_page(browser, may_say="Failed to load resource", **options) as page:
                await page.goto(f"https://localhost:{port}/")
                await _log_in(page, "wrong")
                await expect(page.get_by_role("alert")).to_be_visible()
                assert await findings(page) == []
                assert await page.evaluate("document.documentElement.scrollWidth - innerWidth") == 0
                await page.screenshot(path=place / f"login-{name}-{theme}.png")
                await _log_in(page, "ann-token")
                await expect(page.locator(".live")).to_have_text("live")
                await expect(page.get_by_role("application")).to_be_visible()
                await page.screenshot(path=place / f"login-hive-{name}-{theme}.png")

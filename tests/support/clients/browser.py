"""The distribution's Chromium, driven by Playwright.  ``setup/browser.sh`` installs it."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import playwright
import pytest
from playwright.async_api import Browser, Page, async_playwright, expect

CHROMIUM = Path("/usr/bin/chromium")
NODE = Path(playwright.__file__).parent / "driver" / "node"
"""Node.js, which comes with Playwright and runs the unit tests of the modules."""
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

MARK_FIRST_HIVE = """(function look() {
    if (globalThis.skep?.hive.frames > 0) performance.mark("first hive");
    else requestAnimationFrame(look);
})()"""
"""Set a mark by the page's clock, in the frame after the one in which the hive was drawn."""


def require_chromium() -> None:
    """Skip the test with a reason if Chromium is unavailable.  In continuous integration, fail instead."""
    if CHROMIUM.exists():
        return
    missing = Path(sys.prefix) / "libexec" / "skep" / "browser-missing"
    reason = missing.read_text().strip() if missing.exists() else f"no {CHROMIUM} (make setup, as root)"
    if os.environ.get("CI"):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


@asynccontextmanager
async def a_browser(*flags: str) -> AsyncIterator[Browser]:
    """Run headless Chromium."""
    require_chromium()
    async with async_playwright() as driver:
        browser = await driver.chromium.launch(executable_path=CHROMIUM, args=[*FLAGS, *flags])
        try:
            yield browser
        finally:
            await browser.close()


@asynccontextmanager
async def a_page(browser: Browser, *, may_say: str = "", **options: Any) -> AsyncIterator[Page]:
    """Open a new page.  Console messages and script errors fail the test at the end.

    ``may_say``: text of console lines that are allowed.
    """
    context = await browser.new_context(**options)
    page = await context.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: said.append(f"error: {error.stack}"))
    page.on("dialog", lambda dialog: said.append(f"dialog: {dialog.message}"))
    try:
        yield page
    finally:
        await context.close()
    unexpected = [line for line in said if not may_say or may_say not in line]
    assert unexpected == [], unexpected  # pytest shows no values of a helper's assertions


async def until_true(page: Page, condition: str) -> None:
    """Wait for a condition.  Playwright's own wait evaluates a string in the page, which the page's policy forbids."""
    async with asyncio.timeout(30):
        while not await page.evaluate(f"Boolean({condition})"):  # noqa: ASYNC110 -- nothing announces it
            await asyncio.sleep(0.005)


async def open_place(page: Page, url: str, place: str) -> None:
    """Open a page of the dashboard, and wait until this page is drawn, with the answers that it fetched.

    Playwright returns from a change of the fragment before the page draws it, so a condition on words of any page may
    be met by the page before.
    """
    await page.goto(f"{url}#/{place}")
    await until_true(page, f"globalThis.skep?.drawn === '#/{place}'")
    await expect(page.locator("body")).not_to_contain_text("Loading…")

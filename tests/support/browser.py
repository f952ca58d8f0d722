"""Chromium of the distribution, driven by Playwright: ``setup/browser.sh`` installs it."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import playwright
import pytest
from playwright.async_api import Browser, Page, async_playwright

CHROMIUM = Path("/usr/bin/chromium")
NODE = Path(playwright.__file__).parent / "driver" / "node"
"""Node comes with Playwright: what runs the unit tests of the modules."""
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
"""By the page's own clock, in the frame after that which drew it."""


def require_chromium() -> None:
    """A machine that cannot have it skips the test, with the reason; continuous integration fails."""
    if CHROMIUM.exists():
        return
    missing = Path(sys.prefix) / "libexec" / "skep" / "browser-missing"
    reason = missing.read_text().strip() if missing.exists() else f"no {CHROMIUM} (make setup, as root)"
    if os.environ.get("CI"):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


@asynccontextmanager
async def a_browser(*flags: str) -> AsyncIterator[Browser]:
    """Chromium, without windows."""
    require_chromium()
    async with async_playwright() as driver:
        browser = await driver.chromium.launch(executable_path=CHROMIUM, args=[*FLAGS, *flags])
        try:
            yield browser
        finally:
            await browser.close()


@asynccontextmanager
async def a_page(browser: Browser, *, may_say: str = "", **options: Any) -> AsyncIterator[Page]:
    """A page of its own.  What it says on its console, and any error of a script, fails the test at the end.

    ``may_say``: except for lines with this text.
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
    assert unexpected == [], unexpected  # pytest shows no values of a helper


async def until_true(page: Page, condition: str) -> None:
    """Playwright's own waiting evaluates a string in the page, which its policy refuses."""
    async with asyncio.timeout(30):
        while not await page.evaluate(f"Boolean({condition})"):  # noqa: ASYNC110 -- nothing announces it
            await asyncio.sleep(0.005)

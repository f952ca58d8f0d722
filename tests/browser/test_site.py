"""The built site in a browser, from the disk: search finds pages, and diagrams are drawn."""

from pathlib import Path

import pytest
from playwright.async_api import expect

from tests.support.clients.browser import a_browser, a_page
from tests.support.harness.documents import build_site


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("site")
    build_site(directory)
    return directory


async def test_search_finds_a_page_without_a_server(site: Path) -> None:
    async with a_browser() as browser, a_page(browser) as page:
        await page.goto((site / "guide/start.html").as_uri())
        await page.locator(".md-search__input").fill("quota")
        found = page.locator(".md-search-result__link").first
        await expect(found).to_be_visible(timeout=30_000)
        await found.click()
        await expect(page.locator("h1")).to_contain_text("quota", ignore_case=True)


async def test_the_first_page_says_what_it_is_and_leads_on(site: Path) -> None:
    async with a_browser() as browser, a_page(browser) as page:
        await page.goto((site / "index.html").as_uri())
        await expect(page.locator("h1")).to_have_text("Skep¶")
        await expect(page.locator("article strong").first).to_contain_text("container orchestrator")
        recording = (
            "const one = document.querySelector('article img'); [one.naturalWidth > 0, one.clientWidth > 300]"
        )
        assert await page.evaluate(recording) == [True, True], "the recording is not shown"
        await page.locator("article .md-button", has_text="Get started").click()
        await expect(page.locator("h1")).to_contain_text("Get started")


async def test_a_diagram_is_a_picture_with_legible_labels(site: Path) -> None:
    async with a_browser() as browser, a_page(browser, viewport={"width": 390, "height": 800}) as page:
        await page.goto((site / "design/store.html").as_uri())
        label = page.locator(".diagram svg text").first
        await expect(label).to_be_visible()
        heights = "() => [...document.querySelectorAll('.diagram text')].map(one => one.getBoundingClientRect().height)"
        assert min(height for height in await page.evaluate(heights) if height) >= 8
        assert await page.evaluate("() => document.documentElement.scrollWidth") <= 390

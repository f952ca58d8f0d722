"""``skep ui`` in Chromium on a real cluster: a service is scaled, a node lost, what it did comes back; a terminal."""

import asyncio
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.async_api import Page, expect

from tests.support.clients.browser import a_browser, a_page, require_chromium
from tests.support.clients.dashboard_rig import skep_ui
from tests.support.machines.playground_rig import IDLE, IMAGE, TestCluster, a_playground, wait_until

pytestmark = [pytest.mark.chromium, pytest.mark.slow, pytest.mark.timeout(240)]


@pytest.fixture
def swarm() -> Iterator[TestCluster]:
    require_chromium()
    with a_playground("seen", managers=1, workers=2) as cluster:
        yield cluster


async def test_a_cluster_is_operated_from_the_page(swarm: TestCluster, tmp_path: Path) -> None:
    m1 = swarm.node("m1")
    place = Path(os.environ.get("SKEP_PICTURES", tmp_path))
    create = ("service", "create", "--detach", "--name", "web", "--replicas", "2", IMAGE, *IDLE)
    await asyncio.to_thread(m1.docker, *create)
    size = {"width": 1280, "height": 800}
    async with (
        skep_ui(m1.socket) as address,
        a_browser() as browser,
        a_page(browser, may_say="404", viewport=size) as page,
    ):
        await page.goto(address)
        await expect(_replicas(page)).to_have_text("2/2", timeout=60_000)
        await page.get_by_role("link", name=re.compile("^web: ")).click()
        await _scale(page, 6)
        await expect(_replicas(page)).to_have_text("6/6", timeout=60_000)
        await page.screenshot(path=place / "real-scaled.png")
        await asyncio.to_thread(swarm.skep, "kill", "w1")
        await page.keyboard.press("Escape")
        await expect(page.locator(".attention")).to_contain_text("w1 is down", timeout=60_000)
        await page.screenshot(path=place / "real-lost.png")
        await expect(_replicas(page)).to_have_text("6/6", timeout=60_000)
        await expect(page.get_by_role("application")).to_have_attribute(
            "aria-label", re.compile("1 node not ready")
        )
        await page.screenshot(path=place / "real-healed.png")
        await _roll_back(page)
        await expect(_replicas(page)).to_have_text("2/2", timeout=60_000)
        await _terminal(page)
        await page.screenshot(path=place / "real-terminal.png")
        await page.goto(f"{page.url.partition('#')[0]}#/events")
        await expect(page.locator(".events li").first).to_be_visible()
        await page.screenshot(path=place / "real-events.png")


async def test_a_node_is_drained_and_promoted_from_the_page(swarm: TestCluster, tmp_path: Path) -> None:
    m1 = swarm.node("m1")
    place = Path(os.environ.get("SKEP_PICTURES", tmp_path))
    spread = ("--replicas", "2", "--constraint", "node.hostname!=w2")  # one of them on w1
    await asyncio.to_thread(
        m1.docker, "service", "create", "--detach", "--name", "web", *spread, IMAGE, *IDLE
    )
    async with skep_ui(m1.socket) as address, a_browser() as browser, a_page(browser, may_say="404") as page:
        await page.goto(address)
        await expect(_replicas(page)).to_have_text("2/2", timeout=60_000)
        await _of_node(page, "w1")
        await page.get_by_role("button", name="Drain", exact=True).click()
        dialog = page.get_by_role("dialog", name="Drain w1")
        await expect(dialog).to_contain_text("Tasks stop here and start on the other 2 nodes: web")
        await page.screenshot(path=place / "real-drain.png")
        await dialog.get_by_role("button", name="Drain").click()
        await expect(dialog).to_be_hidden()
        await expect(page.get_by_role("button", name="Activate", exact=True)).to_be_visible(timeout=60_000)
        shown = await asyncio.to_thread(
            m1.docker, "node", "inspect", "w1", "--format", "{{.Spec.Availability}}"
        )
        assert shown.stdout.strip() == "drain"

        await page.get_by_role("button", name="Promote", exact=True).click()
        dialog = page.get_by_role("dialog", name="Promote w1")
        await expect(dialog).to_contain_text("The cluster will have 2 managers and survive the loss of 0.")
        await page.screenshot(path=place / "real-promote.png")
        await dialog.get_by_role("button", name="Promote").click()
        await expect(dialog).to_be_hidden()
        await expect(page.get_by_role("button", name="Demote", exact=True)).to_be_visible(timeout=60_000)
        wait = ("node", "inspect", "w1", "--format", "{{.ManagerStatus.Reachability}}")
        await asyncio.to_thread(
            wait_until, lambda: "reachable" in m1.docker(*wait, check=False).stdout, "w1 is a manager"
        )


async def _of_node(page: Page, name: str) -> None:
    of_name = f"[...skep.cluster.all('nodes')].find((node) => node.name === '{name}')"
    id = await page.evaluate(f"{of_name}.id")
    await page.goto(f"{page.url.partition('#')[0]}#/tasks/nodes/{id}")


def _replicas(page: Page):  # type: ignore[no-untyped-def]
    return page.locator(".services li", has_text="web").locator("> a")


async def _scale(page: Page, replicas: int) -> None:
    await page.get_by_role("button", name="Scale", exact=True).click()
    dialog = page.get_by_role("dialog", name="Scale web")
    await dialog.get_by_label("Replicas").fill(str(replicas))
    await expect(dialog.locator(".preview li.more").first).to_be_visible()
    await dialog.get_by_role("button", name="Scale").click()
    await expect(dialog).to_be_hidden()


async def _roll_back(page: Page) -> None:
    await page.get_by_role("link", name=re.compile("^web: ")).click()
    await page.get_by_role("button", name="Roll back").click()
    dialog = page.get_by_role("dialog", name="Roll back web")
    await expect(dialog.locator(".changes")).to_contain_text("Replicas")
    await dialog.get_by_role("button", name="Roll back").click()
    await expect(dialog).to_be_hidden()


async def _terminal(page: Page) -> None:
    tasks = "[...skep.cluster.all('tasks')].filter((task) => task.state === 'running')"
    task = await page.evaluate(f"{tasks}[0].id")
    await page.goto(f"{page.url.partition('#')[0]}#/tasks/tasks/{task}/terminal")
    await page.get_by_role("button", name="Open", exact=True).click()
    view = page.locator(".terminal")
    await expect(view).to_contain_text("#", timeout=30_000)
    await page.keyboard.type("echo $((6*7))")
    await page.keyboard.press("Enter")
    await expect(view).to_contain_text("42")

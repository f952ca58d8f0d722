"""``skep ui`` with 500 nodes and 10,000 tasks: a real store, the production manager, and a real browser.

::

    .venv/bin/python -m bench.painting                 # kept in results/
    .venv/bin/python -m bench.painting --dry           # only printed

The nodes join and report over the real wire, and have no containers (``simulated_nodes``).  Each page is opened by a
separate ``skep ui``.  *First paint* is the time from the request of the address that the command prints until the frame
after the first with the hive.  It includes login, page, snapshot and frame.  *Change* is the time from an update of a
service's labels until a frame with the new state.  It includes request, commit, view, stream and frame.  The service is
the largest, with 1,000 tasks.  Changes are a second apart, because after a step the view pauses for fifty times as long
as the step took, so that viewers cost a manager at most 2 % of a processor.
"""

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import msgspec
from msgspec.structs import replace
from playwright.async_api import Browser, Page

from bench.crowd import crowd
from bench.engine import Engine
from bench.manager_lab import ManagerLab, one_manager
from bench.run import commit, measure_alone
from bench.thousands import fill
from skep.model.swarm import DEFAULT_SWARM_SPEC, DispatcherConfig
from skep.model.values.times import SECOND_NS
from tests.support.clients.browser import MARK_FIRST_HIVE, a_browser, a_page, until_true
from tests.support.clients.dashboard_rig import skep_ui

NODES, TASKS, TIMES = 500, 10_000, 10
HEARTBEAT_S = 5
FILLED_S = 600.0
APART_S = 1.0
FIRST_PAINT_MAX_MS, CHANGE_MAX_MS = 1000, 200

_LOOK = """([id, version]) => {
    globalThis.drawn = new Promise((resolve) => {
        const look = () => {
            const isThere = skep.cluster.get("services", id).version > version;
            requestAnimationFrame(isThere ? resolve : look);
        };
        look();
    });
}"""
"""``drawn`` is resolved in the frame after the one in which the page has a later version of the service."""


class Result(msgspec.Struct, kw_only=True):
    """Milliseconds."""

    first_paint_ms: list[float] = []
    change_ms: list[float] = []


async def measure() -> Result:
    """Open ``TIMES`` pages, and make as many changes while another page is open."""
    result = Result()
    spec = replace(DEFAULT_SWARM_SPEC, dispatcher=DispatcherConfig(heartbeat_period=HEARTBEAT_S * SECOND_NS))
    async with AsyncExitStack() as stack:
        directory = Path(stack.enter_context(TemporaryDirectory(prefix="skep-painting-", dir="/var/tmp")))
        lab = stack.enter_context(one_manager(directory, spec))
        token = lab.engine().get("/swarm")["JoinTokens"]["Worker"]
        nodes = await stack.enter_async_context(
            crowd("bench.simulated_nodes", str(NODES), lab.address, token)
        )
        await nodes("register")
        service = await asyncio.to_thread(fill, lab.engine(), TASKS)
        async with asyncio.timeout(FILLED_S):
            while await nodes("running") < TASKS:  # noqa: ASYNC110 -- it is asked
                await asyncio.sleep(0.5)
        browser = await stack.enter_async_context(a_browser())
        for _ in range(TIMES):
            async with _open(lab, browser) as (page, address):
                result.first_paint_ms.append(await _first_paint(page, address))
        async with _open(lab, browser) as (page, address):
            await _first_paint(page, address)
            for number in range(TIMES):
                result.change_ms.append(await _change(page, lab.engine(), service, number))
    return result


@asynccontextmanager
async def _open(lab: ManagerLab, browser: Browser) -> AsyncIterator[tuple[Page, str]]:
    """Yield an empty page, and the address that ``skep ui`` prints."""
    async with (
        skep_ui(f"unix://{lab.paths.manager_socket}") as address,
        a_page(browser, may_say="404", viewport={"width": 1280, "height": 800}) as page,
    ):
        await page.add_init_script(MARK_FIRST_HIVE)
        yield page, address


async def _first_paint(page: Page, address: str) -> float:
    began = time.monotonic()
    await page.goto(address)
    await page.wait_for_url("**/ui/**", wait_until="commit")
    await until_true(page, "performance.getEntriesByName('first hive').length")
    return (time.monotonic() - began) * 1000


async def _change(page: Page, engine: Engine, service: str, number: int) -> float:
    await asyncio.sleep(APART_S)
    word = f"change{number}"
    shown = await asyncio.to_thread(engine.get, f"/services/{service}")
    spec = {**shown["Spec"], "Labels": {**shown["Spec"]["Labels"], "seen": word}}
    await page.evaluate(_LOOK, [service, shown["Version"]["Index"]])
    began = time.monotonic()
    await asyncio.to_thread(
        engine.post, f"/services/{service}/update", spec, version=shown["Version"]["Index"]
    )
    await page.evaluate("globalThis.drawn")
    return (time.monotonic() - began) * 1000


def document(result: Result, busy: float) -> str:
    """Return the result for people."""
    now = datetime.now(UTC)
    size = f"{NODES} nodes and {TASKS:,} tasks"
    lines = [
        f"# The dashboard by `skep ui`, {size}, {now:%Y-%m-%d %H:%M UTC}, commit {commit()}",
        "",
        f"{os.cpu_count()} processors for manager, etcd, nodes and browser, {busy:.0%} of them busy before.",
        "",
        "| what | median | smallest | largest | limit | |",
        "|---|---|---|---|---|---|",
    ]
    for name, values, limit in (
        ("first paint, ms", result.first_paint_ms, FIRST_PAINT_MAX_MS),
        ("change, from its request to the frame that has it, ms", result.change_ms, CHANGE_MAX_MS),
    ):
        verdict = "kept" if median(values) <= limit else "**missed**"
        lines.append(
            f"| {name} | {median(values):.0f} | {min(values):.0f} | {max(values):.0f} | {limit} | {verdict} |"
        )
    return "\n".join([*lines, ""])


def main() -> None:
    measure_alone(__doc__ or "", "painting", measure, document)


if __name__ == "__main__":
    main()

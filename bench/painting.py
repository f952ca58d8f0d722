"""``skep ui`` with 500 nodes and 10,000 tasks: a real store, the production manager, and a real browser.

::

    .venv/bin/python -m bench.painting                 # kept in results/
    .venv/bin/python -m bench.painting --dry           # printed alone

The nodes join and report over the real wire, and have no containers (``simulated_nodes``).  Each page is opened by
a ``skep ui`` of its own.  First paint is the frame after the first one that has the hive, timed from before the browser
asks for the address that the command prints: login, page, snapshot, frame.  A change is an update of a service's
labels, timed from before the request until a frame with the page's state after it has been drawn: request, commit,
view, stream and frame in one.  Changes are a second apart: after a step the view rests for fifty times as long as it
took, so that viewers cost a manager at most 2 % of a processor.  The service is the largest, with 1,000 tasks.
"""

import argparse
import asyncio
import os
import sys
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
from bench.machine import noise
from bench.manager_lab import ManagerLab, one_manager
from bench.run import commit, result_name, write_result
from bench.thousands import fill
from skep.model.swarm import DEFAULT_SWARM_SPEC, DispatcherConfig
from skep.model.times import SECOND_NS
from tests.support.browser import MARK_FIRST_HIVE, a_browser, a_page, until_true

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
"""``drawn`` is resolved in the frame after that in which the page has a later version of the service."""


class Result(msgspec.Struct, kw_only=True):
    """Milliseconds."""

    nodes: int
    tasks: int
    busy: float
    first_paint_ms: list[float] = []
    change_ms: list[float] = []


async def measured(options: argparse.Namespace) -> Result:
    """Open ``options.times`` pages, and make as many changes before the eyes of the last one."""
    result = Result(nodes=options.nodes, tasks=options.tasks, busy=noise())
    spec = replace(DEFAULT_SWARM_SPEC, dispatcher=DispatcherConfig(heartbeat_period=HEARTBEAT_S * SECOND_NS))
    async with AsyncExitStack() as stack:
        directory = Path(stack.enter_context(TemporaryDirectory(prefix="skep-painting-", dir="/var/tmp")))
        lab = stack.enter_context(one_manager(directory, spec))
        token = lab.engine().get("/swarm")["JoinTokens"]["Worker"]
        nodes = await stack.enter_async_context(
            crowd("bench.simulated_nodes", str(options.nodes), lab.address, token)
        )
        await nodes("register")
        service = await asyncio.to_thread(fill, lab.engine(), options.tasks)
        async with asyncio.timeout(FILLED_S):
            while await nodes("running") < options.tasks:  # noqa: ASYNC110 -- it is asked
                await asyncio.sleep(0.5)
        browser = await stack.enter_async_context(a_browser())
        for _ in range(options.times):
            async with _opened(lab, browser) as (page, address):
                result.first_paint_ms.append(await _first_paint(page, address))
        async with _opened(lab, browser) as (page, address):
            await _first_paint(page, address)
            for number in range(options.times):
                result.change_ms.append(await _change(page, lab.engine(), service, number))
    return result


@asynccontextmanager
async def _opened(lab: ManagerLab, browser: Browser) -> AsyncIterator[tuple[Page, str]]:
    """An empty page, and the address that ``skep ui`` prints."""
    skep = Path(sys.executable).with_name("skep")
    words = (str(skep), "--host", f"unix://{lab.paths.manager_socket}", "ui", "--no-browser")
    process = await asyncio.create_subprocess_exec(*words, stdout=asyncio.subprocess.PIPE)
    try:
        assert process.stdout is not None
        address = (await asyncio.wait_for(process.stdout.readline(), 30)).decode().strip()
        async with a_page(browser, may_say="404", viewport={"width": 1280, "height": 800}) as page:
            await page.add_init_script(MARK_FIRST_HIVE)
            yield page, address
    finally:
        process.terminate()
        await process.wait()


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


def document(result: Result) -> str:
    """The result for people."""
    now = datetime.now(UTC)
    size = f"{result.nodes} nodes and {result.tasks:,} tasks"
    lines = [
        f"# The dashboard by `skep ui`, {size}, {now:%Y-%m-%d %H:%M UTC}, commit {commit()}",
        "",
        f"{os.cpu_count()} processors for manager, etcd, nodes and browser, {result.busy:.0%} of them busy before.",
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


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench.painting", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, default=500)
    parser.add_argument("--tasks", type=int, default=10_000)
    parser.add_argument("--times", type=int, default=10, help="pages, and changes")
    parser.add_argument("--dry", action="store_true", help="keep no result")
    return parser.parse_args()


def main() -> None:
    options = _options()
    result = asyncio.run(measured(options))
    text = document(result)
    if not options.dry:
        write_result(result_name(datetime.now(UTC), commit(), "painting"), text, msgspec.to_builtins(result))
    print(text)


if __name__ == "__main__":
    main()

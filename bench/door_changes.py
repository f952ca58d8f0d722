"""Changes of tasks at the front door, compared with Caddy, whose admin API changes its upstreams.

Both are processes on loopback, before the same tasks: HAProxy with the configuration that a node writes, changed by the
node's own code, and Caddy as a dynamic configuration of its user would change it.  A task starts and joins, and leaves
and ends, two hundred changes in a minute.  Clients send requests all the time.  The time counts from the change until
the first response of the new task.  A failed request is one without the status 200.
"""

import asyncio
import json
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from time import monotonic

from aiohttp import ClientError, ClientSession, ClientTimeout, TCPConnector

from bench.figures import Figure, at_quantile, ratio, run_alone, run_undisturbed
from tests.support.networks.door_rig import DoorRig, a_door, free_port

HOST = "app.example.com"
STAYS, COMES = "127.0.0.2", "127.0.0.3"
CHANGES, PERIOD_S = 200, 60.0
CLIENTS = 4
PAUSE_S = 0.002
"""Seconds between two requests of a client, far less than the limit."""
SERVES_S_MAX = 0.3
"""Limit: an update waits for it with each task."""
QUANTILE = 0.95
START_S = 20.0
"""Time limit of Caddy's start in seconds, on a machine with other work."""

Change = Callable[[Sequence[str]], Awaitable[None]]
"""Lets a proxy use the tasks at these addresses and no others."""


def figures(pairs: int) -> list[Figure]:
    """Measure times and failed requests."""
    with tempfile.TemporaryDirectory(prefix="skep-bench-", dir="/var/tmp") as directory:
        Path(directory).chmod(0o755)  # HAProxy's own user reaches its sockets there
        return asyncio.run(_measure(Path(directory), pairs))


async def _measure(directory: Path, pairs: int) -> list[Figure]:
    (directory / "door").mkdir()
    async with a_door(directory / "door") as rig, rig.tasks(STAYS), _caddy(directory, rig) as (port, patch):

        async def apply(addresses: Sequence[str]) -> None:
            if COMES not in addresses and COMES in rig.endpoints:
                rig.task(COMES, "web", COMES, is_serving=False)
                await rig.apply()
                del rig.endpoints[COMES]
            for address in addresses:
                rig.task(address, "web", address)
            await rig.apply()

        rig.service("web", {"skep.http": HOST})
        ways = {"Caddy": (port, patch), "door": (rig.port, apply)}

        async def one(number: int) -> dict[str, tuple[float, int]]:
            order = list(ways) if number % 2 else list(reversed(ways))
            return {way: await _change(rig, *ways[way]) for way in order}

        values, busy = await run_undisturbed(pairs, one)
    times = {way: tuple(value[way][0] for value in values) for way in ways}
    failed = {way: tuple(float(value[way][1]) for value in values) for way in ways}
    what = f"with {CHANGES} changes of tasks in a minute"
    return [
        Figure(
            number=0,
            what=f"time until the first response of a new task (p95 of each run), {what}",
            unit="s",
            values=times["door"],
            limit=SERVES_S_MAX,
            sides=times,
            busy=tuple(busy),
        ),
        ratio(0, f"the same, beside Caddy, {what}", times),
        Figure(
            number=0,
            what=f"failed requests in a minute, {what}",
            unit="requests",
            values=failed["door"],
            quantile=1.0,
            limit=0.0,
            sides=failed,
        ),
    ]


async def _change(rig: DoorRig, port: int, change: Change) -> tuple[float, int]:
    """Let a task come and go during requests.  Return the p95 of the seconds until it responds, and the failures."""
    found: list[float] = []
    seen: dict[str, float] = {}
    failed, is_over = 0, asyncio.Event()

    async def send(session: ClientSession) -> None:
        nonlocal failed
        while not is_over.is_set():
            try:
                async with session.get(f"http://127.0.0.1:{port}/", headers={"Host": HOST}) as response:
                    text = await response.text()
                if response.status == 200:
                    seen[json.loads(text)["task"]] = monotonic()
                else:
                    failed += 1
            except (ClientError, TimeoutError):
                failed += 1
            await asyncio.sleep(PAUSE_S)

    await change([STAYS])
    connector = TCPConnector(limit=0)
    async with (
        ClientSession(connector=connector, timeout=ClientTimeout(10)) as session,
        asyncio.TaskGroup() as group,
    ):
        for _ in range(CLIENTS):
            group.create_task(send(session))
        first = monotonic()
        for number in range(CHANGES // 2):
            await asyncio.sleep(first + number * 2 * PERIOD_S / CHANGES - monotonic())
            async with rig.tasks(COMES):
                seen.pop(COMES, None)
                began = monotonic()
                await change([STAYS, COMES])
                async with asyncio.timeout(START_S):
                    while COMES not in seen:  # noqa: ASYNC110  # a client of this process sets it
                        await asyncio.sleep(PAUSE_S / 2)
                found.append(seen[COMES] - began)
                await asyncio.sleep(PERIOD_S / CHANGES)
                await change([STAYS])
        is_over.set()
    return at_quantile(found, QUANTILE), failed


@asynccontextmanager
async def _caddy(directory: Path, rig: DoorRig) -> AsyncIterator[tuple[int, Change]]:
    """Run Caddy during the block.  Yield its port, and what changes its upstreams."""
    port, admin = free_port(), free_port()
    proxy = {"handler": "reverse_proxy", "upstreams": [], "load_balancing": {"retries": 3}}
    server = {"listen": [f"127.0.0.1:{port}"], "routes": [{"match": [{"host": [HOST]}], "handle": [proxy]}]}
    server["automatic_https"] = {"disable": True}
    file = directory / "caddy.json"
    file.write_text(
        json.dumps(
            {"admin": {"listen": f"127.0.0.1:{admin}"}, "apps": {"http": {"servers": {"door": server}}}}
        )
    )
    with (directory / "caddy.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            "caddy", "run", "--config", str(file), env={"HOME": str(directory)}, stdout=log, stderr=log
        )
    url = f"http://127.0.0.1:{admin}/config/apps/http/servers/door/routes/0/handle/0/upstreams"
    try:
        async with ClientSession() as session, asyncio.timeout(None) as limit:

            async def change(addresses: Sequence[str]) -> None:
                upstreams = [{"dial": f"{address}:{rig.task_port}"} for address in addresses]
                async with session.patch(url, json=upstreams) as response:
                    response.raise_for_status()

            limit.reschedule(asyncio.get_running_loop().time() + START_S)
            while True:
                with suppress(ClientError):
                    await change([STAYS])
                    break
                await asyncio.sleep(0.02)
            limit.reschedule(None)
            yield port, change
    finally:
        process.terminate()
        await process.wait()


if __name__ == "__main__":
    run_alone(__doc__ or "", "door-changes", figures)

"""A made-up cluster served as a manager and ``skep ui`` would.

``python -m tests.browser.served_cluster --nodes 5 --tasks 24`` serves one that keeps changing, to look at.
"""

import argparse
import asyncio
import json
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from aiohttp import WSMsgType, web

from skep.dashboard.pages import page_response, pages
from skep.dashboard.passing import SESSION, is_allowed
from tests.browser.made_up_cluster import MadeUpCluster, Row, make, step

KEY = "k"
"""Of the address: the pages are below a path that they do not know."""
_OF_THE_SERVER = (SESSION, "/skep/ui/logout")
"""Requests that the dashboard's server answers itself."""


def app_of(cluster: MadeUpCluster, root: str = f"/{KEY}") -> web.Application:
    """The addresses of ``skep ui``, below ``root``."""
    app = web.Application()

    async def static(request: web.Request) -> web.Response:
        page = pages().get(request.match_info.get("name", ""))
        if page is None:
            raise web.HTTPNotFound
        return page_response(page, request.headers.get("If-None-Match", ""))

    async def view(request: web.Request) -> web.Response:
        """Of earlier times, ``cluster.then``."""
        rows = cluster.then if "at" in request.query else cluster.snapshot()
        return web.Response(body=msgspec.json.encode(rows), content_type="application/json")

    async def history(request: web.Request) -> web.Response:
        since = float(request.query.get("since", "0"))
        kept = [entry for entry in cluster.history if _seconds(entry["Time"]) >= since]
        oldest = cluster.history[0]["Time"] if cluster.history else ""
        entries = sorted(kept, key=lambda entry: str(entry["Time"]), reverse=True)[
            : int(request.query.get("limit", "200"))
        ]
        return web.json_response(
            {
                "Entries": entries,
                "Next": "",
                "Oldest": oldest,
                "OldestState": oldest,
                "Total": len(cluster.history),
            }
        )

    async def any_request(request: web.Request) -> web.StreamResponse:
        target = request.path_qs.removeprefix(root)
        if target not in _OF_THE_SERVER and not is_allowed(request.method, target):
            raise web.HTTPForbidden(text=f"the dashboard may not send {request.method} {target}")
        body = await request.json() if request.can_read_body else None
        if request.method != "GET":
            cluster.requests.append((request.method, request.path_qs.removeprefix(root), body))
        return web.json_response(_answer(cluster, request.path.removeprefix(root), body))

    async def doctor(_request: web.Request) -> web.Response:
        names = [row["name"] for row in cluster.rows["nodes"].values()]
        finding = {"Check": "overlay", "Port": "4789/udp", "Sent": 4, "Lost": 0, "RoundTripMs": 1.5}
        lines: list[Row] = [{"Nodes": [{"ID": name} for name in names]}]
        for name in names:
            paths = [{"PeerID": peer, "Peer": peer, "Findings": [finding]} for peer in names if peer != name]
            lines.append({"ID": name, "Hostname": name, "Paths": paths})
        return web.Response(text="".join(json.dumps(line) + "\n" for line in lines))

    async def stream(request: web.Request) -> web.StreamResponse:
        return await _stream(cluster, request)

    async def logs(request: web.Request) -> web.StreamResponse:
        return await _logs(cluster, request)

    app.router.add_get(root + "/ui/", static)
    app.router.add_get(root + "/ui/{name}", static)
    app.router.add_get(root + "/skep/view", view)
    app.router.add_get(root + "/skep/view/stream", stream)
    app.router.add_get(root + "/skep/history", history)
    app.router.add_get(root + "/skep/doctor/network", doctor)
    app.router.add_get(root + "/skep/ui/exec", _terminal)
    app.router.add_get(root + "/v1.43/{kind}/{id}/logs", logs)
    app.router.add_route("*", root + "/{path:.*}", any_request)
    return app


def _seconds(stamp: str) -> float:
    return time.mktime(time.strptime(stamp[:19], "%Y-%m-%dT%H:%M:%S")) - time.timezone


def _answer(cluster: MadeUpCluster, path: str, body: Any) -> Any:
    """The little that the pages read of the Engine API."""
    match path.strip("/").split("/"):
        case ["services", id]:
            row = cluster.rows["services"][id]
            container = {"Image": row["image"]}
            spec = {
                "Name": row["name"],
                "TaskTemplate": {"ContainerSpec": container, "ForceUpdate": 0},
                "Mode": {"Replicated": {"Replicas": row["desired"]}},
                "UpdateConfig": {"Parallelism": 2, "Order": "start-first", "FailureAction": "rollback"},
            }
            return {"ID": id, "Version": {"Index": row["version"]}, "Spec": spec}
        case ["nodes", id]:
            row = cluster.rows["nodes"][id]
            spec = {"Availability": row["availability"], "Role": row["role"], "Labels": row["labels"]}
            return {"ID": id, "Version": {"Index": row["version"]}, "Spec": spec}
        case ["skep", "services", "placement"]:
            wanted = body[0]["Mode"]["Replicated"]["Replicas"]
            nodes = [row for row in cluster.rows["nodes"].values() if row["availability"] == "active"]
            shares = [
                {
                    "NodeID": row["id"],
                    "Hostname": row["name"],
                    "Tasks": wanted // len(nodes) + (i < wanted % len(nodes)),
                }
                for i, row in enumerate(nodes)
            ]
            return [
                {"Name": body[0]["Name"], "Desired": wanted, "Nodes": shares, "Error": "", "Verdicts": []}
            ]
        case ["skep", "tasks", id, "explain"] if cluster.rows["tasks"][id]["error"]:
            lines = [{"Stream": "stderr", "Text": line} for line in cluster.lines]
            return {
                "Summary": cluster.rows["tasks"][id]["error"],
                "End": {"Cause": "out-of-memory", "Lines": lines},
            }
        case ["skep", "services", id, "explain"]:
            row = cluster.rows["services"][id]
            summary = row["reason"] or f"{row['running']} of {row['desired']} tasks run"
            found = {"Summary": summary, "Reasons": [], "Failures": [], "Running": row["running"]}
            return {**found, "Desired": row["desired"], "Reason": row["reason"]}
        case ["skep", "tasks", id, "explain"]:
            return {"Summary": f"{cluster.rows['tasks'][id]['state']} as desired"}
        case ["tasks"]:
            return []
        case ["skep", "door"]:
            return cluster.routes
        case ["skep", "ui", "session"]:
            return {"user": "", "roles": [], "by_login": False}
        case _:
            return {}


async def _stream(cluster: MadeUpCluster, request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"})
    await response.prepare(request)
    queue: asyncio.Queue[Row] = asyncio.Queue()
    cluster.streams.add(queue)

    async def send(event: str, data: Row) -> None:
        await response.write(f"id: {data['cursor']}\nevent: {event}\ndata: {json.dumps(data)}\n\n".encode())

    try:
        await response.write(b"retry: 300\n\n")
        if request.query.get("after") != f"1-{cluster.revision}":
            await send("snapshot", cluster.snapshot())
        while True:
            await send("change", await queue.get())
    except (ConnectionError, asyncio.CancelledError):
        return response
    finally:
        cluster.streams.discard(queue)


async def _logs(cluster: MadeUpCluster, request: web.Request) -> web.StreamResponse:
    kind = "application/vnd.docker.multiplexed-stream"
    response = web.StreamResponse(headers={"Content-Type": kind})
    await response.prepare(request)
    tasks = [
        row
        for row in cluster.rows["tasks"].values()
        if request.match_info["id"] in (row["id"], row["service"])
    ]
    for i in range(60 if cluster.lines else 0):
        task = tasks[i % len(tasks)]
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(cluster.now - 60 + i))
        ids = {"node": task["node"], "service": task["service"], "task": task["id"]}
        details = ",".join(f"com.docker.swarm.{kind}.id={id}" for kind, id in ids.items())
        line = f"{stamp}.000000000Z {details} {cluster.lines[i % len(cluster.lines)]}\n".encode()
        await response.write(bytes([2 if i % 5 == 4 else 1, 0, 0, 0]) + len(line).to_bytes(4, "big") + line)
    await asyncio.sleep(3600)
    return response


async def _terminal(request: web.Request) -> web.WebSocketResponse:
    """A shell that says again what it is told."""
    socket = web.WebSocketResponse()
    await socket.prepare(request)
    await socket.send_bytes(b"\x1b[1;32m/ # \x1b[0m")
    async for message in socket:
        if message.type == WSMsgType.BINARY:
            text = message.data.replace(b"\r", b"\r\n\x1b[31mnot found\x1b[0m\r\n\x1b[1;32m/ # \x1b[0m")
            await socket.send_bytes(text)
            if b"\x04" in message.data:
                await socket.send_str(json.dumps({"exit_code": 0}))
                break
    await socket.close()
    return socket


@asynccontextmanager
async def served(cluster: MadeUpCluster, port: int = 0) -> AsyncIterator[str]:
    """Serves the cluster; gives the address of its page."""
    runner = web.AppRunner(app_of(cluster), shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/{KEY}/ui/"
    finally:
        await runner.cleanup()


async def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, default=5)
    parser.add_argument("--tasks", type=int, default=24)
    parser.add_argument("--port", type=int, default=8099)
    parser.add_argument("--every", type=float, default=1.0, help="seconds between changes")
    asked = parser.parse_args()
    cluster = make(asked.nodes, asked.tasks)
    rng = random.Random(2)
    async with served(cluster, asked.port) as url:
        print(url)
        while True:
            await asyncio.sleep(asked.every)
            step(cluster, rng)


if __name__ == "__main__":
    asyncio.run(_main())

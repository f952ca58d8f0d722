"""A volume plugin for tests, with Docker's protocol on a unix socket: directories, and a record of all calls."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from aiohttp import web


class TestPlugin:
    """A volume plugin.

    ``volumes``: options by name.  ``answers``: text to send instead, by method, or None to send nothing.
    """

    __test__ = False

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.calls: list[tuple[str, Mapping[str, Any]]] = []
        self.volumes: dict[str, Mapping[str, str]] = {}
        self.mounts: dict[str, set[str]] = {}
        self.answers: dict[str, str | None] = {}
        self.scope = "global"

    @asynccontextmanager
    async def listening(self, socket: Path) -> AsyncIterator["TestPlugin"]:
        """Serve on ``socket`` as long as the block runs."""
        app = web.Application()
        app.router.add_post("/{method}", self._handle)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        socket.parent.mkdir(parents=True, exist_ok=True)
        try:
            await web.UnixSite(runner, str(socket)).start()
            yield self
        finally:
            await runner.cleanup()
            socket.unlink(missing_ok=True)

    @property
    def methods(self) -> list[str]:
        """Return the received calls in order, without the handshake and lookups."""
        looks = ("Plugin.Activate", "VolumeDriver.Capabilities", "VolumeDriver.Get", "VolumeDriver.Path")
        return [
            method.partition(".")[2]
            for method, _ in self.calls
            if method not in (*looks, "VolumeDriver.List")
        ]

    async def _handle(self, request: web.Request) -> web.Response:
        method, body = request.match_info["method"], await request.text()
        asked = json.loads(body) if body.strip() else {}
        self.calls.append((method, asked))
        if method in self.answers:
            given = self.answers[method]
            if given is None:
                await asyncio.Event().wait()
            return web.Response(text=given)
        return web.json_response(
            self._answer(method, asked or {}), content_type="application/vnd.docker.plugins.v1.1+json"
        )

    def _answer(self, method: str, asked: Mapping[str, Any]) -> dict[str, Any]:
        name = asked.get("Name", "")
        path = self.directory / "volumes" / name
        is_of_one = method.partition(".")[2] in ("Get", "Mount", "Remove", "Path")
        if is_of_one and name not in self.volumes:
            return {"Err": "no such volume"}
        match method.partition(".")[2]:
            case "Activate":
                return {"Implements": ["VolumeDriver"]}
            case "Capabilities":
                return {"Capabilities": {"Scope": self.scope}}
            case "Create":
                if "refuse" in (asked["Opts"] or {}):
                    return {"Err": "it has no room"}
                path.mkdir(parents=True, exist_ok=True)
                self.volumes[name] = asked["Opts"] or {}
            case "Remove":
                del self.volumes[name]
            case "Mount":
                self.mounts.setdefault(name, set()).add(asked["ID"])
                return {"Mountpoint": str(path), "Err": ""}
            case "Unmount":
                self.mounts.setdefault(name, set()).discard(asked["ID"])
            case "Path":
                return {"Mountpoint": str(path)}
            case "Get":
                return {"Volume": {"Name": name, "Mountpoint": str(path), "Status": {"disks": 2}, "Extra": 1}}
            case "List":
                return {
                    "Volumes": [{"Name": one, "Mountpoint": str(path.parent / one)} for one in self.volumes]
                }
        return {"Err": ""}

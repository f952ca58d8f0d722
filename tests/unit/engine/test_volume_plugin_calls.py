"""Calls of volume plug-ins: which of them say that one does not respond, and which files they read."""

import asyncio
import os
import ssl
import threading
from pathlib import Path
from typing import Any

import pytest

from skep.aio.clock import SystemClock
from skep.engine.volumes import volume_plugins
from skep.engine.volumes.volume_plugins import (
    CALLS_MAX,
    PluginEndpoint,
    VolumePlugin,
    VolumePlugins,
    checked_path,
)
from skep.engine.volumes.volumes import Volumes
from skep.errors import Unavailable
from tests.support.engine.oci_rig import Machine, memory_engine
from tests.support.storage.volume_plugin import TestPlugin


async def test_a_plugin_that_is_busy_counts_as_one_that_responds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with TestPlugin(tmp_path / "disks").listening(tmp_path / "disks.sock"):
        plugin = VolumePlugin("disks", PluginEndpoint(addr=f"unix://{tmp_path}/disks.sock"), SystemClock())
        for _ in range(CALLS_MAX):
            await plugin.calls.acquire()  # by calls that take long
        monkeypatch.setattr(volume_plugins, "LIST_S", 0.01)
        with pytest.raises(Unavailable, match="16 other calls did not end"):
            await plugin.list()
        monkeypatch.undo()
        for _ in range(CALLS_MAX):
            plugin.calls.release()
        await plugin.list()


class StoppedClock(SystemClock):
    """Its time is what the test says."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s


async def test_a_plugin_that_hangs_is_asked_again_after_a_while_and_not_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(volume_plugins, "LIST_S", 0.05)
    clock = StoppedClock()
    async with TestPlugin(tmp_path / "disks").listening(tmp_path / "disks.sock") as server:
        plugin = VolumePlugin("disks", PluginEndpoint(addr=f"unix://{tmp_path}/disks.sock"), clock)
        server.answers["VolumeDriver.List"] = None
        with pytest.raises(Unavailable, match=r"plugin disks: no response within 0\.05 s"):
            await plugin.list()
        with pytest.raises(Unavailable, match="plugin disks does not respond; next attempt in"):
            await plugin.get("data")
        assert [method for method, _ in server.calls] == ["VolumeDriver.List"]
        clock.now_s += 30.0  # its longest pause
        assert await plugin.get("data") is None


async def test_no_more_is_read_of_an_endless_response_than_one_may_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        try:
            while True:
                writer.write(b"x" * 65536)
                await writer.drain()
        except ConnectionError:
            writer.close()

    monkeypatch.setattr(volume_plugins, "LIST_S", 5.0)
    async with await asyncio.start_unix_server(respond, tmp_path / "disks.sock"):
        plugin = VolumePlugin("disks", PluginEndpoint(addr=f"unix://{tmp_path}/disks.sock"), SystemClock())
        with pytest.raises(Unavailable, match="its response is larger than 1048576 bytes"):
            await plugin.list()


@pytest.mark.parametrize("path", ["", "volumes/one", "/srv/../etc", "/srv//one", "/a\0b", "/" + "x" * 5000])
def test_a_path_that_no_volume_can_have_is_refused(path: str) -> None:
    assert checked_path("disks", "/srv/one") == "/srv/one"
    with pytest.raises(Unavailable, match="plugin disks returned "):
        checked_path("disks", path)


async def test_a_pipe_in_place_of_a_certificate_holds_nothing_up(tmp_path: Path) -> None:
    pipe = tmp_path / "ca.pem"
    os.mkfifo(pipe)
    (tmp_path / "disks.json").write_text(
        f'{{"Addr": "tcp://127.0.0.1:9", "TLSConfig": {{"CAFile": "{pipe}"}}}}'
    )
    with pytest.raises(Unavailable, match="not a regular file"):
        await VolumePlugins(tmp_path / "sockets", (tmp_path,)).get("disks")


async def test_certificates_are_read_in_a_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []

    def read(**_: Any) -> Any:
        threads.append(threading.get_ident())
        raise OSError("cannot be read")

    monkeypatch.setattr(ssl, "create_default_context", read)
    (tmp_path / "disks.json").write_text('{"Addr": "tcp://127.0.0.1:9", "TLSConfig": {}}')
    with pytest.raises(Unavailable, match="cannot be read"):
        await VolumePlugins(tmp_path / "sockets", (tmp_path,)).get("disks")
    assert threads != [threading.get_ident()]


async def test_an_unmount_that_failed_is_tried_again(tmp_path: Path) -> None:
    server = TestPlugin(tmp_path / "disks")
    async with server.listening(tmp_path / "sockets" / "disks.sock"):
        volumes = Volumes(tmp_path / "volumes", plugins=VolumePlugins(tmp_path / "sockets", ()))
        await volumes.create("data", "disks", {}, {})
        await (await volumes.plugins.get("disks")).mount("data", "ended")
        volumes.keep_mounts("data", {"ended"})
        server.answers["VolumeDriver.Unmount"] = "no answer of a plug-in"
        with pytest.raises(Unavailable):
            await volumes.unmount_unused()
        del server.answers["VolumeDriver.Unmount"]
        for _ in range(2):  # the second time nothing is left to be done
            await volumes.unmount_unfinished()
    assert server.methods[-3:] == ["Mount", "Unmount", "Unmount"]
    assert not volumes.mounts_of("data")


async def test_the_engine_tries_it_again_by_itself(tmp_path: Path) -> None:
    server = TestPlugin(tmp_path / "disks")
    engine = memory_engine(tmp_path, Machine())
    volumes = engine.volumes
    async with server.listening(tmp_path / "sockets" / "disks.sock"), asyncio.timeout(20), engine.running():
        volumes.plugins = VolumePlugins(tmp_path / "sockets", ())
        await volumes.create("data", "disks", {}, {})
        await (await volumes.plugins.get("disks")).mount("data", "c1")
        volumes.keep_mounts("data", {"c1"})
        volumes.users["data"].add("c1")
        server.answers["VolumeDriver.Unmount"] = "no answer of a plug-in"
        with pytest.raises(Unavailable):
            await volumes.unmount("c1")
        del server.answers["VolumeDriver.Unmount"]
        while volumes.mounts_of("data"):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert not server.mounts.get("data")

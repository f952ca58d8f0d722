"""Calls of volume plug-ins: which of them say that one does not respond, and which files they read."""

import asyncio
import errno
import os
import threading
from pathlib import Path

import pytest

from skep.aio.clock import Clock, SystemClock
from skep.engine.volumes.volume_plugins import (
    CALLS_MAX,
    PluginEndpoint,
    PluginTimes,
    VolumePlugin,
    VolumePlugins,
    checked_path,
)
from skep.engine.volumes.volumes import Volumes
from skep.errors import AlreadyExists, Unavailable
from tests.support.engine.oci_rig import Machine, memory_engine
from tests.support.file_faults import file_faults
from tests.support.storage.volume_plugin import TestPlugin


def a_plugin(directory: Path, clock: Clock, list_s: float) -> VolumePlugin:
    endpoint = PluginEndpoint(addr=f"unix://{directory}/disks.sock")
    return VolumePlugin("disks", endpoint, clock, PluginTimes(list_s=list_s))


async def test_a_plugin_that_is_busy_counts_as_one_that_responds(tmp_path: Path) -> None:
    async with TestPlugin(tmp_path / "disks").listening(tmp_path / "disks.sock"):
        plugin = a_plugin(tmp_path, SystemClock(), 0.2)
        for _ in range(CALLS_MAX):
            await plugin.calls.acquire()  # by calls that take long
        with pytest.raises(Unavailable, match="16 other calls did not end"):
            await plugin.list()
        for _ in range(CALLS_MAX):
            plugin.calls.release()
        await plugin.list()


class StoppedClock(SystemClock):
    """Its time is what the test says."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s


async def test_a_plugin_that_hangs_is_asked_again_after_a_while_and_not_before(tmp_path: Path) -> None:
    clock = StoppedClock()
    async with TestPlugin(tmp_path / "disks").listening(tmp_path / "disks.sock") as server:
        plugin = a_plugin(tmp_path, clock, 0.05)
        server.answers["VolumeDriver.List"] = None
        with pytest.raises(Unavailable, match=r"plugin disks: no response within 0\.05 s"):
            await plugin.list()
        with pytest.raises(Unavailable, match="plugin disks does not respond; next attempt in"):
            await plugin.get("data")
        assert [method for method, _ in server.calls] == ["VolumeDriver.List"]
        clock.now_s += 30.0  # its longest pause
        assert await plugin.get("data") is None


async def test_no_more_is_read_of_an_endless_response_than_one_may_have(tmp_path: Path) -> None:
    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        try:
            while True:
                writer.write(b"x" * 65536)
                await writer.drain()
        except ConnectionError:
            writer.close()

    async with await asyncio.start_unix_server(respond, tmp_path / "disks.sock"):
        plugin = a_plugin(tmp_path, SystemClock(), 5.0)
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


async def test_certificates_are_read_in_a_thread(tmp_path: Path) -> None:
    certificate, threads = tmp_path / "ca.pem", set[int]()
    certificate.write_text("")
    (tmp_path / "disks.json").write_text(
        f'{{"Addr": "tcp://127.0.0.1:9", "TLSConfig": {{"CAFile": "{certificate}"}}}}'
    )

    def is_certificate(_call: str, path: Path) -> bool:
        if path == certificate:
            threads.add(threading.get_ident())
        return path == certificate

    with file_faults(tmp_path) as faults:
        faults.choose(errno.EIO, is_certificate)
        with pytest.raises(Unavailable, match="Input/output error"):
            await VolumePlugins(tmp_path / "sockets", (tmp_path,)).get("disks")
    assert threads
    assert threading.get_ident() not in threads


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


async def test_of_two_drivers_one_gets_a_name_that_is_wanted_at_the_same_moment(tmp_path: Path) -> None:
    sockets = tmp_path / "sockets"
    async with (
        TestPlugin(tmp_path / "one").listening(sockets / "one.sock") as one,
        TestPlugin(tmp_path / "two").listening(sockets / "two.sock") as two,
    ):
        volumes = Volumes(tmp_path / "volumes", plugins=VolumePlugins(sockets, ()))
        creations = [volumes.create("data", driver) for driver in ("one", "two")]
        results = await asyncio.gather(*creations, return_exceptions=True)
        refused = [one for one in results if one is not None]
        assert [type(one) for one in refused] == [AlreadyExists]
        assert len(one.methods + two.methods) == 1
        assert "Create" in (one if volumes.driver("data") == "one" else two).methods


async def test_a_local_volume_that_is_created_meanwhile_is_not_taken_for_one_of_a_driver(
    tmp_path: Path,
) -> None:
    sockets = tmp_path / "sockets"
    async with TestPlugin(tmp_path / "disks").listening(sockets / "disks.sock") as plugin:
        volumes = Volumes(tmp_path / "volumes", plugins=VolumePlugins(sockets, ()))
        async with volumes.lock_of("data"):
            creating = asyncio.create_task(volumes.create("data", "disks"))
            await asyncio.wait([creating], timeout=0)
            volumes.ensure("data")
        with pytest.raises(AlreadyExists, match="driver 'local' already has volume 'data'"):
            await creating
        assert plugin.methods == []

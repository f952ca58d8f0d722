"""Log drivers that send elsewhere, on real containers: remotes that are away, hang or refuse, and restarts."""

import asyncio
import json
import os
import signal
import ssl
import subprocess
from functools import partial
from pathlib import Path

import pytest
from aiohttp import web

from skep.engine.containers.container import LogConfig, LogFilter
from skep.engine.engine import Engine
from skep.engine.log_drivers.drivers import sending_drivers
from skep.engine.log_drivers.options import log_config
from skep.errors import Unimplemented
from skep.model.values.meta import Driver
from tests.integration.node.conftest import Runner, eventually
from tests.support.engine.log_receivers import datagrams, free_port, gelf_messages, streams
from tests.support.engine.runc_lab import Lab

COUNTING = "for i in $(seq 1 {}); do echo line $i; done"


def logged(driver: str, **options: str) -> LogConfig:
    written = {name.replace("_", "-"): value for name, value in options.items()}
    return log_config(Driver(name=driver, options=written), sending_drivers())


def numbers(received: bytes) -> list[int]:
    """Of the lines ``line N``."""
    return [int(line.rsplit(b" ", 1)[1]) for line in received.splitlines() if b"line " in line]


async def test_a_remote_that_is_away_holds_up_no_container_and_gets_every_line_later(
    run: Runner, engine: Engine, tmp_path: Path
) -> None:
    """Also with what a container wrote that is removed since; ``docker logs`` reads meanwhile."""
    port = free_port()
    log = logged("syslog", syslog_address=f"tcp://127.0.0.1:{port}")
    container = await run.start("sh", "-c", COUNTING.format(2000), log=log)
    async with asyncio.timeout(20):
        await engine.wait(container.id)
    assert len((await run.logs(container)).splitlines()) == 2000
    await engine.remove(container.id)
    async with streams(port) as server:
        await eventually(lambda: len(numbers(server.received)) >= 2000, "all lines have come", 30)
        assert numbers(server.received) == list(range(1, 2001))


async def test_a_remote_that_hangs_or_ends_gets_the_rest_when_it_is_back(run: Runner, engine: Engine) -> None:
    port = free_port()
    log = logged("syslog", syslog_address=f"tcp://127.0.0.1:{port}")
    async with streams(port) as server:
        server.reading.clear()
        writer = await run.start("sh", "-c", COUNTING.format(50_000), log=log)
        other = await run.start("sh", "-c", COUNTING.format(10), log=logged("local"))
        async with asyncio.timeout(30):
            await engine.wait(writer.id)
            await engine.wait(other.id)
        server.reading.set()
        await eventually(lambda: len(numbers(server.received)) >= 10_000, "it goes on", 30)
        before = server.received
    async with streams(port) as server:
        await eventually(lambda: 50_000 in numbers(server.received), "the rest has come", 30)
        assert set(numbers(before)) | set(numbers(server.received)) == set(range(1, 50_001))
    await engine.remove(writer.id)


async def test_a_new_node_process_goes_on_where_the_last_one_stopped(lab: Lab) -> None:
    port = free_port()
    log = logged("gelf", gelf_address=f"udp://127.0.0.1:{port}")
    async with datagrams(port) as receiver:

        def seen() -> list[int]:
            return [int(one["short_message"].split()[1]) for one in gelf_messages(receiver.received)]

        first = lab.executor()
        async with first.running():
            script = "echo line 1; echo line 2; sleep 3; echo line 3"
            container = await Runner(lab, first.engine).start("sh", "-c", script, log=log)
            await eventually(lambda: seen() == [1, 2], "two lines have come")
        second = lab.executor()
        async with second.running():
            await second.engine.wait(container.id)
            await eventually(lambda: 3 in seen(), "the third has come")
            assert seen() == [1, 2, 3]
            await second.engine.remove(container.id)


async def test_a_sender_that_is_killed_is_started_again_and_no_line_is_lost(
    run: Runner, engine: Engine
) -> None:
    port = free_port()
    log = logged("syslog", syslog_address=f"tcp://127.0.0.1:{port}")
    async with streams(port) as server:
        script = "echo line 1; sleep 2; echo line 2; sleep 100"
        container = await run.start("sh", "-c", script, log=log)
        await eventually(lambda: numbers(server.received) == [1], "the first line has come")
        pid = engine.log_forwarding.pid
        assert pid
        os.kill(pid, signal.SIGKILL)
        await eventually(lambda: 2 in numbers(server.received), "the second has come", 20)
        assert engine.log_forwarding.pid not in (0, pid)
        await engine.remove(container.id, force=True)


async def test_without_blocking_a_small_buffer_drops_what_does_not_fit(
    run: Runner, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    port = free_port()
    log = logged(
        "syslog", syslog_address=f"tcp://127.0.0.1:{port}", mode="non-blocking", max_buffer_size="10k"
    )
    container = await run.start("sh", "-c", COUNTING.format(5000), log=log)
    await engine.wait(container.id)
    async with streams(port) as server:
        await eventually(lambda: len(numbers(server.received)) >= 50, "what fitted has come", 30)
        await engine.remove(container.id)
        await eventually(lambda: engine.log_forwarding.pid == 0, "the sender has ended", 20)
        found = numbers(server.received)
    assert found == list(range(1, len(found) + 1))
    assert len(found) < 200


async def test_a_log_without_a_cache_is_sent_but_not_read(run: Runner, engine: Engine) -> None:
    port = free_port()
    async with datagrams(port) as receiver:
        log = logged("gelf", gelf_address=f"udp://127.0.0.1:{port}", cache_disabled="true")
        container = await run.start("echo", "hello", log=log)
        await eventually(lambda: gelf_messages(receiver.received), "it has come")
        with pytest.raises(Unimplemented, match="configured logging driver does not support reading"):
            engine.logs(container.id, LogFilter())


async def test_a_machine_with_a_journal_has_its_driver(tmp_path: Path) -> None:
    """At a socket of the test's: no journal runs here."""
    socket = tmp_path / "journal"
    assert "journald" not in sending_drivers(socket)
    async with datagrams(socket):
        assert "journald" in sending_drivers(socket)


async def test_splunk_gets_batches_of_events(run: Runner, engine: Engine) -> None:
    posted: list[tuple[str, bytes]] = []
    failures = [503]

    async def collect(request: web.Request) -> web.Response:
        if failures:
            return web.Response(status=failures.pop(), text="busy")
        posted.append((request.headers["Authorization"], await request.read()))
        return web.json_response({"text": "Success", "code": 0})

    app = web.Application()
    app.router.add_post("/services/collector/event/1.0", collect)
    runner = web.AppRunner(app)
    await runner.setup()
    port = free_port()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    try:
        url = f"http://127.0.0.1:{port}"
        log = logged("splunk", splunk_url=url, splunk_token="t0", splunk_gzip="true", splunk_format="json")
        container = await run.start("sh", "-c", """echo '{"a": 1}'; echo plain >&2""", log=log)
        await eventually(lambda: b"plain" in b"".join(body for _, body in posted), "the events have come", 20)
    finally:
        await runner.cleanup()
    assert {authorization for authorization, _ in posted} == {"Splunk t0"}
    decoder, text = json.JSONDecoder(), b"".join(body for _, body in posted).decode()
    events = []
    while text:
        event, end = decoder.raw_decode(text)
        events.append(event)
        text = text[end:]
    assert [event["event"] for event in events] == [
        {"line": {"a": 1}, "source": "stdout", "tag": container.id[:12]},
        {"line": "plain", "source": "stderr", "tag": container.id[:12]},
    ]
    await engine.remove(container.id)


async def test_syslog_over_tls_counts_the_bytes_of_a_message(run: Runner, tmp_path: Path) -> None:
    command = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    command += " -addext subjectAltName=DNS:localhost -keyout key -out certificate"
    made = partial(
        subprocess.run, ["openssl", *command.split()], check=True, cwd=tmp_path, capture_output=True
    )
    await asyncio.to_thread(made)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "certificate", tmp_path / "key")
    port = free_port()
    async with streams(port, tls=context) as server:
        log = logged(
            "syslog",
            syslog_address=f"tcp+tls://localhost:{port}",
            syslog_tls_ca_cert=str(tmp_path / "certificate"),
            syslog_format="rfc5424",
        )
        await run.start("echo", "hello", log=log)
        await eventually(lambda: b"hello" in server.received, "it has come")
        size, _, message = server.received.partition(b" ")
        assert int(size) == len(message)

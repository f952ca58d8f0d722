"""The same container with the same log driver in Skep's engine and in a real one, both sending to the same receiver."""

import asyncio
import json
import re
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest

from skep.engine.engine import Engine
from skep.engine.log_drivers.drivers import sending_drivers
from skep.engine.log_drivers.options import log_config
from skep.errors import InvalidArgument
from skep.model.values.meta import Driver
from skep.playground.images.busybox import busybox_archive
from tests.integration.node.conftest import Runner, eventually
from tests.support.engine.log_receivers import (
    datagrams,
    fluentd_messages,
    free_port,
    gelf_messages,
    streams,
)
from tests.support.machines.plain_engine import docker, engine_in

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(240),
    pytest.mark.needs("root", "runc", "conmon", "dockerd"),
]

SCRIPT = (
    "echo hello; sleep 0.2; echo wrong >&2; sleep 0.2; echo; printf 'a\\tb \\377\\n'; "
    "head -c 40000 /dev/zero | tr '\\000' x; echo; printf 'no newline'"
)
NAME = "beside"
ENV = {"COLOUR": "red", "SHAPE": "round"}
LABELS = {"io.skep.one": "1", "other": "2"}
COMMON = {"labels-regex": "^io", "env": "COLOUR", "tag": "{{.Name}}/{{.ImageName}}"}


@pytest.fixture(scope="module")
def dockerd() -> Iterator[Path]:
    """A dockerd in the test's own network namespace, without networks of its own."""
    directory = Path(tempfile.mkdtemp(prefix="skep-logs-", dir="/var/tmp"))
    written = '{"iptables": false, "ip6tables": false, "bridge": "none"}'
    before = f"echo '{written}' > {directory}/etc/daemon.json"
    with engine_in(directory, before=before) as socket:
        archive = asyncio.run(busybox_archive())
        assert docker(socket, "load", stdin=archive.data).returncode == 0
        yield socket


class Both:
    """Runs the same container in each system, and removes it."""

    def __init__(self, dockerd: Path, run: Runner, engine: Engine) -> None:
        self._dockerd = dockerd
        self._run = run
        self._engine = engine

    async def run(self, system: str, driver: str, options: dict[str, str]) -> None:
        await (self._in_docker if system == "docker" else self._in_skep)(driver, options)

    async def _in_docker(self, driver: str, options: dict[str, str]) -> None:
        words = ["run", "--rm", "--name", NAME, "--network", "none", "--log-driver", driver]
        for option, values in (("--log-opt", options), ("--env", ENV), ("--label", LABELS)):
            for name, value in values.items():
                words += [option, f"{name}={value}"]
        done = await asyncio.to_thread(docker, self._dockerd, *words, "busybox:1", "sh", "-c", SCRIPT)
        assert done.returncode == 0, done.stderr

    async def _in_skep(self, driver: str, options: dict[str, str]) -> None:
        log = log_config(Driver(name=driver, options=options), sending_drivers())
        env = tuple(f"{name}={value}" for name, value in ENV.items())
        container = await self._run.create("sh", "-c", SCRIPT, name=NAME, labels=LABELS, env=env, log=log)
        await self._engine.start(container.id)
        await self._engine.wait(container.id)
        await self._engine.remove(container.id)


@pytest.fixture
def both(dockerd: Path, run: Runner, engine: Engine) -> Both:
    return Both(dockerd, run, engine)


OWN = {"_container_id", "_created", "_image_id", "host", "timestamp"}
"""Of GELF messages: what differs from one container to the next."""
SYSTEMS = ("docker", "skep")
HOST = socket.gethostname().encode()


@pytest.mark.parametrize(
    ("network", "format"),
    [("udp", ""), ("udp", "rfc3164"), ("tcp", "rfc5424"), ("unix", "rfc5424micro"), ("unixgram", "rfc3164")],
)
async def test_syslog_messages_are_the_same(both: "Both", tmp_path: Path, network: str, format: str) -> None:
    path, port, is_local = tmp_path / "syslog", free_port(), network.startswith("unix")
    where = f"{network}://{path}" if is_local else f"{network}://127.0.0.1:{port}"
    options = {"syslog-address": where, "syslog-format": format, "syslog-facility": "local3", **COMMON}
    found = []
    for system in SYSTEMS:
        path.unlink(missing_ok=True)
        whole: Callable[[], bytes]
        async with AsyncExitStack() as stack:
            if network in ("tcp", "unix"):
                server = await stack.enter_async_context(streams(path if is_local else port))
                whole = partial(getattr, server, "received")
            else:
                receiver = await stack.enter_async_context(datagrams(path if is_local else port))
                whole = partial(b"".join, receiver.received)
            await both.run(system, "syslog", options)
            await eventually(lambda whole=whole: whole().count(b"\n") >= 7, "seven messages")  # type: ignore[misc]
            found.append([_comparable(line) for line in whole().splitlines()])
    assert found[1] == found[0]


def _comparable(line: bytes) -> bytes:
    """Without times and process ids."""
    line = re.sub(rb"\d\d:\d\d:\d\d(\.\d{6})?", b"TIME", line).replace(HOST, b"lab")
    return re.sub(rb"\[\d+\]:|busybox:1 \d+ ", b"PID ", line)


@pytest.mark.parametrize("compression", ["gzip", "zlib", "none", "tcp"])
async def test_gelf_messages_are_the_same(both: "Both", compression: str) -> None:
    port, found = free_port(), []
    for system in SYSTEMS:
        if compression == "tcp":
            async with streams(port) as server:
                await both.run(system, "gelf", {"gelf-address": f"tcp://127.0.0.1:{port}", **COMMON})
                await eventually(lambda server=server: server.received.count(b"\0") >= 7, "seven")  # type: ignore[misc]
                messages = [json.loads(one) for one in server.received.split(b"\0")[:-1]]
        else:
            options = {"gelf-address": f"udp://127.0.0.1:{port}", "gelf-compression-type": compression}
            async with datagrams(port) as receiver:
                await both.run(system, "gelf", {**options, **COMMON})
                await eventually(lambda r=receiver: len(gelf_messages(r.received)) >= 7, "seven")  # type: ignore[misc]
                messages = gelf_messages(receiver.received)
        assert all(isinstance(message["timestamp"], float) for message in messages)
        found.append([{key: value for key, value in one.items() if key not in OWN} for one in messages])
    assert found[1] == found[0]


@pytest.mark.parametrize(
    "options", [{}, {"fluentd-sub-second-precision": "true", "fluentd-request-ack": "true"}]
)
async def test_fluentd_messages_are_the_same(both: "Both", tmp_path: Path, options: dict[str, str]) -> None:
    def answer(data: bytes) -> bytes:
        chunks = [(one[3] or {}).get(b"chunk") for one in fluentd_messages(data)]
        return b"".join(msgspec.msgpack.encode({"ack": chunk.decode()}) for chunk in chunks if chunk)

    path, found = tmp_path / "fluentd", []
    for system in SYSTEMS:
        path.unlink(missing_ok=True)
        async with streams(path, answer) as server:
            await both.run(system, "fluentd", {"fluentd-address": f"unix://{path}", **options, **COMMON})
            await eventually(lambda s=server: len(fluentd_messages(s.received)) >= 8, "eight messages")  # type: ignore[misc]
            found.append([_comparable_message(*one) for one in fluentd_messages(server.received)])
    assert found[1] == found[0]


def _comparable_message(
    tag: bytes, moment: Any, record: dict[bytes, bytes], option: dict[bytes, bytes]
) -> tuple[Any, ...]:
    """Without what differs from one container to the next."""
    for name in (b"container_id", b"partial_id"):
        if name in record:
            record[name] = b"%d" % len(record[name])
    return tag, type(moment), record, sorted(option)


@pytest.mark.parametrize(
    ("driver", "options"),
    [
        ("syslog", {"colour": "red"}),
        ("syslog", {"syslog-address": "ftp://here"}),
        ("syslog", {"syslog-facility": "nosuch"}),
        ("syslog", {"syslog-format": "nosuch"}),
        ("syslog", {"syslog-address": "unix:///nosuch"}),
        ("gelf", {}),
        ("gelf", {"gelf-address": "udp://here"}),
        ("gelf", {"gelf-address": "http://here:1"}),
        ("gelf", {"gelf-address": "tcp://here:1", "gelf-compression-type": "gzip"}),
        ("gelf", {"gelf-address": "udp://here:1", "gelf-tcp-max-reconnect": "1"}),
        ("fluentd", {"colour": "red"}),
        ("splunk", {"colour": "red"}),
        ("json-file", {"mode": "loud"}),
        ("json-file", {"max-buffer-size": "1m"}),
        ("local", {"colour": "red"}),
        ("json-file", {"cache-disabled": "perhaps"}),
    ],
)
async def test_wrong_options_are_refused_in_the_same_words(
    dockerd: Path, driver: str, options: dict[str, str]
) -> None:
    words = ["create", "--log-driver", driver]
    for name, value in options.items():
        words += ["--log-opt", f"{name}={value}"]
    done = await asyncio.to_thread(docker, dockerd, *words, "busybox:1", "true")
    with pytest.raises(InvalidArgument) as refused:
        log_config(Driver(name=driver, options=options), sending_drivers())
    assert done.stderr.decode().strip().replace('"', "'").endswith(str(refused.value).replace('"', "'"))

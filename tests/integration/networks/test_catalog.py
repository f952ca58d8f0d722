"""A machine outside of the cluster registers its service, and its HAProxy follows the catalog, as the guide says."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from tests.integration.networks.lab import asking, in_place, outside, serve, tasks_of, wait_stopped
from tests.integration.networks.test_haproxy import own_address
from tests.support.harness.documents import shell_blocks
from tests.support.machines.playground_rig import (
    SKEP,
    TestNode,
    a_playground,
    running,
    wait_running,
    wait_until,
)

pytestmark = [pytest.mark.needs("haproxy"), pytest.mark.slow, pytest.mark.timeout(240)]

WEB, STORE, SERVER, STILL = 18080, 18081, 18082, 18083


@contextmanager
def program(place: Path, *words: str) -> Iterator[subprocess.Popen[str]]:
    """A program on the machine outside, which is ended after the block."""
    process = subprocess.Popen(
        ["nsenter", f"--net={place}", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        yield process
    finally:
        process.terminate()
        process.communicate(timeout=20)


def answer(address: str, port: int) -> int:
    """The status of a request, or 0 for none."""
    try:
        with urlopen(f"http://{address}:{port}/", timeout=5) as response:
            return int(response.status)
    except URLError as error:
        return int(getattr(error, "code", 0))
    except OSError:
        return 0


def tasks_in(file: Path) -> set[str]:
    """The tasks that HAProxy's file names."""
    return set(re.findall(r"server task-(\w+)", file.read_text()))


def first_of_nodes(m1: TestNode, service: str) -> set[str]:
    """The first running task on each node, for which the file has a server."""
    tasks = sorted(running(m1, service), key=lambda task: str(task["ID"]), reverse=True)
    return {*{task["NodeID"]: task["ID"] for task in tasks}.values()}


def listed(m1: TestNode) -> str:
    """What the guide's first command prints."""
    command = shell_blocks("docs/guide/catalog.md")[0].replace("skep", f"{SKEP} --host {m1.socket}", 1)
    done = subprocess.run(["sh", "-ec", command], capture_output=True, text=True, timeout=60, check=True)
    return done.stdout


def test_services_inside_and_outside_are_reached_by_a_local_haproxy(tmp_path: Path) -> None:
    with a_playground("catalog", managers=1, workers=1) as cluster:
        m1, place = cluster.node("m1"), outside(cluster)
        own = in_place(place, own_address, m1.description["addr"])
        skep = (SKEP, "--host", m1.socket)
        serve(m1, "web", 2, "-p", "8080:80", "--stop-grace-period", "30s", "--label", "skep.drain=3s")
        serve(m1, "still", 1, "-p", "8081:80", "--constraint", "node.role==worker")
        wait_running(m1, "web", 2, 60)
        wait_running(m1, "still", 1, 60)
        pid, file = tmp_path / "pid", tmp_path / "haproxy.cfg"
        start = f"haproxy -W -D -p {pid} -f {file}"
        reload = f"sh -c 'if [ -e {pid} ]; then kill -USR2 $(cat {pid}); else {start}; fi'"
        places = ("--file", str(file), "--socket", str(tmp_path / "admin"), "--user", "", "--reload", reload)
        register = (*skep, "register", "store", "--address", own, "--port", str(SERVER))
        often = ("--http", "/", "--ttl", "5s", "--interval", "200ms")
        server = (sys.executable, "-m", "http.server", str(SERVER), "--directory", "/usr/share")
        listeners = (f"web={own}:{WEB}/http", f"store={own}:{STORE}/http", f"still={own}:{STILL}/http")
        answers = partial(in_place, place, answer, own)
        try:
            with program(place, *server), program(place, *skep, "balance", *places, *listeners):
                with program(place, *register, *often) as registrar:
                    wait_until(lambda: (answers(WEB), answers(STORE)) == (200, 200), "both answer")
                    assert f"{own}:{SERVER}" in listed(m1)
                    registrar.terminate()
                    wait_until(lambda: answers(STORE) == 503, "it is removed when the command ends")
                with program(place, *register, *often) as registrar:
                    wait_until(lambda: answers(STORE) == 200, "it is registered again")
                    os.kill(registrar.pid, signal.SIGKILL)
                    wait_until(lambda: answers(STORE) == 503, "its lease ends")
                client = ("strict_client.py", "--pause=0.005", "--fresh", f"http://{own}:{WEB}/")
                with asking((place, client)) as seen:
                    before = tasks_of(m1)
                    m1.docker("service", "update", "--detach", "--force", "web")
                    wait_until(lambda: len(tasks_of(m1) - before) == 2, "all tasks are new", 90)
                    wait_stopped(m1, before)
                assert seen.failed == []
                assert seen.count > 20
                wait_until(
                    lambda: tasks_in(file) == first_of_nodes(m1, "web") | first_of_nodes(m1, "still"),
                    "the file has the new tasks alone",
                )
                written = file.read_bytes()
                cluster.skep("kill", "m1")
                wait_until(lambda: all(answers(STILL) == 200 for _ in range(10)), "the worker answers")
                assert file.read_bytes() == written
        finally:
            with suppress(FileNotFoundError, ProcessLookupError):
                os.kill(int(pid.read_text()), signal.SIGTERM)

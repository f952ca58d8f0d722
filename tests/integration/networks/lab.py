"""What tests of networks share: servers to ask, strict clients beside a fault, and what the store says is true."""

import json
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from skep.dataplane.netns.kernel.namespaces import inside
from tests.support.machines.playground_rig import (
    TestCluster,
    TestNode,
    container_pids,
    create,
    remove_services,
    running,
    wait_until,
)

T = TypeVar("T")

HERE = Path(__file__).parent
PYTHON = str(Path(sys.base_prefix) / "bin" / f"python3.{sys.version_info.minor}")
PLACES = sorted({"/usr", "/lib", "/lib64", sys.base_prefix, str(HERE)})
"""What the machine's Python needs, shown to containers that have nothing but busybox."""
LISTENS = "import socket; socket.create_connection(('127.0.0.1', 80), 5)"


# -- servers ---------------------------------------------------------------------------------------------------------


def serve(m1: TestNode, name: str, replicas: int, *options: str) -> None:
    """A service of graceful web servers at port 80 (``graceful_server.py``)."""
    mounts = [
        word
        for place in PLACES
        if Path(place).exists()
        for word in ("--mount", f"type=bind,source={place},target={place},readonly")
    ]
    # It gets no requests until it listens, for which a busy machine gets longer than three probes: an unhealthy task
    # pauses an update.
    probe = f'{PYTHON} -c "{LISTENS}"'
    health = ("--health-cmd", probe, "--health-interval", "300ms", "--health-retries", "60")
    command = (PYTHON, str(HERE / "graceful_server.py"), "80")
    create(m1, name, replicas, *mounts, *health, *options, command=command)


SERVE = ("httpd", "-f", "-p", "80", "-h", "/etc")
"""A small server: its host's name is at ``/hostname``."""


def hostname_of(address: str, port: int = 80, within_s: float = 10) -> str:
    """What the server at ``address`` is called; in the thread's namespace.  Raises: OSError."""
    with socket.create_connection((address, port), timeout=within_s) as connection:
        connection.sendall(b"GET /hostname HTTP/1.0\r\n\r\n")
        response = b"".join(iter(lambda: connection.recv(4096), b""))
    return response.decode().split()[-1]


# -- places ----------------------------------------------------------------------------------------------------------


def place_of(node: TestNode, service: str) -> Path:
    """The network namespace of the only container that ``service`` has on ``node``."""
    (pid,) = container_pids(node, service).values()
    return Path(f"/proc/{pid}/ns/net")


def outside(cluster: TestCluster) -> Path:
    """The network namespace of the playground's switch: a machine that is no node."""
    namespace, _ = cluster.node("m1").description["link"]
    return Path("/run/netns") / namespace


def in_place(place: Path, call: Callable[..., T], *words: Any) -> T:
    """Call it there and come back."""
    return inside(place, partial(call, *words))


# -- strict clients --------------------------------------------------------------------------------------------------


class Seen:
    """What strict clients saw, once they have ended."""

    def __init__(self) -> None:
        self.answered: Counter[str] = Counter()
        """Who answered, or what: how often."""
        self.failed: list[str] = []

    @property
    def count(self) -> int:
        return self.answered.total()


@contextmanager
def asking(*clients: tuple[Path, Sequence[str]], within_s: float = 60) -> Iterator[Seen]:
    """Clients run for as long as the block does; then what they saw.

    Each is a place and a script of this folder with its words: ``("strict_client.py", URL)``.  Within ``within_s``
    after the block they have their last answer.
    """
    seen = Seen()
    with ExitStack() as stack:
        for place, (script, *words) in clients:
            stack.enter_context(_client(seen, place, [sys.executable, str(HERE / script), *words], within_s))
        yield seen


@contextmanager
def _client(seen: Seen, place: Path, command: Sequence[str], within_s: float) -> Iterator[None]:
    client = subprocess.Popen(["nsenter", f"--net={place}", *command], stdout=subprocess.PIPE, text=True)
    try:
        assert client.stdout is not None
        assert client.stdout.readline() == "asking\n"
        yield
    finally:
        client.send_signal(signal.SIGTERM)
        said = json.loads(client.communicate(timeout=within_s)[0] or "{}")
        seen.failed += said.get("failed", ["the client ended"])
        seen.answered.update(said.get("answered", {}))


# -- the truth -------------------------------------------------------------------------------------------------------


def node_id(node: TestNode, name: str) -> str:
    return str(node.client().api.inspect_node(name)["ID"])


def tasks_of(node: TestNode, service: str = "web") -> set[str]:
    """Ids of tasks that run and are wanted."""
    return {task["ID"] for task in running(node, service)}


def addresses(manager: TestNode, service: str, network: str) -> set[str]:
    """Addresses, on ``network``, of the tasks of ``service`` that run and are wanted, as the store has them."""
    return {
        attachment["Addresses"][0].partition("/")[0]
        for task in running(manager, service)
        for attachment in task["NetworksAttachments"]
        if attachment["Network"]["Spec"]["Name"] == network
    }


def virtual_address(manager: TestNode, service: str, network: str) -> str:
    """The virtual address that the store has for ``service`` on ``network``."""
    api = manager.client().api
    network_id = api.inspect_network(network)["Id"]
    found = api.inspect_service(service)["Endpoint"]["VirtualIPs"]
    return next(str(one["Addr"]).partition("/")[0] for one in found if one["NetworkID"] == network_id)


def wait_stopped(node: TestNode, tasks: set[str]) -> None:
    """Until each of ``tasks`` has ended on its node."""

    def ended() -> bool:
        shown = {task["ID"]: task["Status"]["State"] for task in node.client().api.tasks()}
        return all(shown.get(id, "shutdown") not in ("running", "starting", "ready") for id in tasks)

    wait_until(ended, "what is to stop has stopped", 90)


def remove_all(manager: TestNode) -> None:
    """Services and their tasks, then the networks that are not the swarm's own."""
    api = manager.client().api
    remove_services(manager)
    for network in api.networks(filters={"driver": "overlay"}):
        if not network["Ingress"]:
            api.remove_network(network["Id"])

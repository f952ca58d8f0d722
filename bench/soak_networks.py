"""Checks of networks in a soak between two rounds, from inside containers.

* **Every service responds to every member.** From each container, each service that shares a network with it is
  resolved at 127.0.0.11.  Each resolved address (one virtual address, or all tasks' addresses without one) returns the
  page of that service, which contains its secret and its volume.  Each published port does so on every node.
* **No address twice**, among the containers of all nodes.
* **No namespace without a container.**
* **No counter of drops rises** while the cluster is at rest and receives these requests.  They count drops of
  interfaces, of name servers' sockets, and of the kernel's tables of neighbors and connections.
"""

import base64
import random
import socket
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from dnslib import QTYPE, DNSRecord

from bench.engine import Engine, EngineError
from skep.dataplane.netns import read
from skep.dataplane.netns.kernel.namespaces import inside
from skep.dataplane.netns.state import NamespaceState
from skep.playground.description import PlaygroundNode

NETWORKS: dict[str, dict[str, str]] = {"plain": {}, "other": {}, "secret": {"encrypted": ""}}
"""Overlays by name, with their options."""
SECRET = "soak-secret"
SECRET_DATA = b"open sesame"
PORT = 80
RESPONSE_S = 5.0
AT_ONCE = 16
OWN_SUBNETS = "10."
"""Prefix of addresses on overlays.  Those of gateway bridges are specific to each node."""
SERVER = (
    "trap 'exit 0' TERM INT; mkdir -p /tmp/www; echo -n \"$SERVICE \" > /tmp/www/index.html;"
    f"cat /run/secrets/{SECRET} >> /tmp/www/index.html; touch /data/up && echo -n ' kept' >> /tmp/www/index.html;"
    f"busybox httpd -f -p {PORT} -h /tmp/www & wait $!"
)
T = TypeVar("T")


class Service(msgspec.Struct, frozen=True):
    """Requested state of a service.  ``published``: 0 if it has no published port."""

    name: str
    networks: tuple[str, ...] = ()
    published: int = 0
    secret: bytes = SECRET_DATA

    @property
    def page(self) -> bytes:
        return f"{self.name} ".encode() + self.secret + b" kept"


class Member(msgspec.Struct, frozen=True):
    """A running container.  ``space`` is its network namespace."""

    id: str
    service: str
    node: str
    space: Path
    addresses: tuple[str, ...]


def make(engine: Engine) -> None:
    """Create the networks and the secret of the services.  Existing ones are kept."""
    for name, options in NETWORKS.items():
        _made(engine, "/networks/create", {"Name": name, "Driver": "overlay", "Options": options})
    data = base64.b64encode(SECRET_DATA).decode()
    _made(engine, "/secrets/create", {"Name": SECRET, "Data": data})


def _made(engine: Engine, path: str, spec: dict[str, Any]) -> None:
    try:
        engine.post(path, spec)
    except EngineError as error:
        if error.status != 409:
            raise


def secret_id(engine: Engine) -> str:
    """Return the id of the secret.  Raises: EngineError."""
    return str(engine.get(f"/secrets/{SECRET}")["ID"])


def members(nodes: Iterable[tuple[PlaygroundNode, Engine]]) -> list[Member]:
    """Return all running containers of services.  Raises: EngineError, or OSError if one has just ended."""
    found = []
    for node, engine in nodes:
        for container in engine.get("/containers/json"):
            pid = engine.get(f"/containers/{container['Id']}/json")["State"]["Pid"]
            space = Path(f"/proc/{pid}/ns/net")
            service = container["Labels"]["com.docker.swarm.service.name"]
            found.append(Member(container["Id"], service, node.name, space, within(space, _addresses)))
    return found


def faults(nodes: list[tuple[PlaygroundNode, Engine]], services: Mapping[str, Service]) -> str:
    """Return the first violation, or an empty string.  Raises: EngineError, OSError."""
    present = members(nodes)
    twice = [
        f"{address} is held by {count} containers"
        for address, count in Counter(one for each in present for one in each.addresses).items()
        if count > 1
    ]
    left = _left_over(nodes, present)
    gone = [f"{one.service} has a container on {one.node}" for one in present if one.service not in services]
    if twice or left or gone:  # a container of a removed service may be back with its machine, for a moment
        return "; ".join([*twice, *left, *gone])
    before = _drops(nodes, present)
    refused = _refused(nodes, present, services)
    risen = _drops(nodes, present)
    risen.subtract(before)
    drops = [f"{name} rose by {number}" for name, number in sorted(risen.items()) if number > 0]
    more = [f"{len(refused) - 5} more"] if len(refused) > 5 else []
    return "; ".join([*refused[:5], *more, *drops])


# -- answers -------------------------------------------------------------------------------------------------------


def _refused(
    nodes: list[tuple[PlaygroundNode, Engine]], present: list[Member], services: Mapping[str, Service]
) -> list[str]:
    running = {one.service for one in present}
    asked: list[tuple[Path, str, Callable[[], str]]] = []  # namespace, its owner, and the check
    for member in present:
        own = set(services[member.service].networks)
        asked += [
            (member.space, f"{member.service} on {member.node}", partial(by_name, service))
            for service in services.values()
            if service.name in running and own & set(service.networks)
        ]
    for node, _ in nodes:
        for service in services.values():
            if service.published and service.name in running:
                for other, _ in nodes:
                    address = "127.0.0.1" if other is node else other.addr
                    asked.append(
                        (
                            Path(node.netns),
                            node.name,
                            lambda one=service, at=address: page(one, at, one.published),
                        )
                    )
    with ThreadPoolExecutor(AT_ONCE) as threads:
        responses = threads.map(lambda one: _tried(one[0], one[2]), asked)
        return [f"{who}: {wrong}" for (_, who, _), wrong in zip(asked, responses, strict=True) if wrong]


def _tried(space: Path, ask: Callable[[], str]) -> str:
    try:
        return within(space, ask)
    except OSError as error:
        return str(error)


def by_name(service: Service) -> str:
    """Return why a service does not respond by its name from the current namespace, or an empty string if it does."""
    question = DNSRecord.question(service.name)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as opened:
        opened.settimeout(RESPONSE_S)
        try:
            opened.sendto(question.pack(), ("127.0.0.11", 53))
            response = DNSRecord.parse(opened.recv(4096))
        except OSError as error:
            return f"{service.name} is not resolved: {error}"
    addresses = [str(one.rdata) for one in response.rr if one.rtype == QTYPE.A]
    if not addresses:
        return f"{service.name} has no address: {QTYPE.A} {response.header.rcode}"
    return next((wrong for one in addresses if (wrong := page(service, one, PORT))), "")


def page(service: Service, address: str, port: int) -> str:
    """Return why the server at ``address`` is not the service, or an empty string if it is."""
    where = f"{service.name} at {address}:{port}"
    try:
        body = fetched(address, port)
    except OSError as error:
        return f"{where}: {error}"
    return "" if body == service.page else f"{where}: {body[:80]!r} instead of {service.page!r}"


def fetched(address: str, port: int) -> bytes:
    """Return the page there.  Raises: OSError."""
    with socket.create_connection((address, port), timeout=RESPONSE_S) as connection:
        connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
        response = b""
        while piece := connection.recv(4096):
            response += piece
    return response.partition(b"\r\n\r\n")[2]


# -- state ---------------------------------------------------------------------------------------------------------


def within(space: Path, work: Callable[[], T]) -> T:
    """Run ``work`` in a namespace, on a thread that ends with it.  Raises: OSError."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(inside, space, work).result()


def _addresses() -> tuple[str, ...]:
    held = read.read_namespace(lambda _: True, NamespaceState()).state.addresses
    return tuple(
        sorted(
            address for one in held if (address := one.interface.partition("/")[0]).startswith(OWN_SUBNETS)
        )
    )


PINS = "/run/skep/netns/"
"""Directory of containers' namespaces on a playground's node.  At its start it also inherits mounts of other
programs.
"""


def _left_over(nodes: list[tuple[PlaygroundNode, Engine]], present: list[Member]) -> list[str]:
    """Return namespaces without a container.  Those of the probes and of networks are in other directories."""
    found = []
    for node, engine in nodes:
        running = {one.id for one in present if one.node == node.name}
        ready = {one["Id"] for one in engine.get("/containers/json", all=1, filters={"status": ["created"]})}
        mounts = Path(f"/proc/{node.pids[0]}/mounts").read_text()
        pinned = {
            words[1].rpartition("/")[2]
            for line in mounts.splitlines()
            if (words := line.split())[1].startswith(PINS) and words[0] == "nsfs"
        }
        found += [
            f"{node.name}: namespace {id[:12]} of no container" for id in sorted(pinned - running - ready)
        ]
    return found


def _drops(nodes: list[tuple[PlaygroundNode, Engine]], present: list[Member]) -> Counter[str]:
    """Return the counters of drops, by name."""
    found: Counter[str] = Counter()
    for name in ("arp_cache", "ndisc_cache"):
        with suppress(OSError):
            found[f"overflows of {name}"] = _column(Path("/proc/net/stat", name), "table_fulls")
    for label, space in [
        *((node.name, Path(node.netns)) for node, _ in nodes),
        *((f"{one.service} on {one.node}", one.space) for one in present),
    ]:
        with suppress(OSError):
            found.update({f"{label}: {name}": number for name, number in within(space, _drops_here).items()})
    return found


def _drops_here() -> dict[str, int]:
    """Return the counters of the current namespace."""
    found = {}
    for line in Path("/proc/thread-self/net/dev").read_text().splitlines()[2:]:
        name, _, counts = line.partition(":")
        words = counts.split()
        # The count of an interface disappears with it, and the count of a remaining interface only rises.
        found[f"{name.strip()} dropped"] = int(words[3]) + int(words[11])
    for line in Path("/proc/thread-self/net/udp").read_text().splitlines()[1:]:
        words = line.split()
        if words[1].startswith("0B00007F"):
            found["name server dropped"] = found.get("name server dropped", 0) + int(words[12])
    for name in ("drop", "early_drop", "insert_failed"):
        with suppress(OSError, KeyError, ValueError):
            found[f"conntrack {name}"] = _column(Path("/proc/thread-self/net/stat/nf_conntrack"), name)
    return found


def _column(path: Path, name: str) -> int:
    """Return the sum of one counter over all processors."""
    head, *lines = path.read_text().splitlines()
    number = head.split().index(name)
    return sum(int(line.split()[number], 16) for line in lines)


def chosen(name: str, number: int, rng: random.Random) -> Service:
    """Return a service on one or two networks.  Every third is published.  ``number`` is unique for each service."""
    networks = tuple(sorted(rng.sample(sorted(NETWORKS), rng.randint(1, 2))))
    return Service(name, networks, 20000 + number % 10000 if rng.random() < 0.34 else 0)


def spec_of(service: Service, image: str, secret: str, rng: random.Random) -> dict[str, Any]:
    """Return a service's specification without its name and mode.  ``secret`` is the id of the secret that all have."""
    is_dnsrr = not service.published and rng.random() < 0.3
    ports = [{"TargetPort": PORT, "PublishedPort": service.published, "Protocol": "tcp"}]
    container: dict[str, Any] = {
        "Image": image,
        "Command": ["sh", "-c", SERVER],
        "Env": [f"SERVICE={service.name}"],
        "Mounts": [{"Type": "volume", "Source": f"{service.name}-data", "Target": "/data"}],
    }
    file = {"Name": SECRET, "UID": "0", "GID": "0", "Mode": 0o444}
    container["Secrets"] = [{"File": file, "SecretID": secret, "SecretName": SECRET}]
    return {
        "TaskTemplate": {
            "ContainerSpec": container,
            "RestartPolicy": {"Condition": "any", "Delay": 0},
            "Networks": [{"Target": one} for one in service.networks],
        },
        "EndpointSpec": {"Mode": "dnsrr"} if is_dnsrr else {"Ports": ports if service.published else []},
    }

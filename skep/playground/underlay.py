"""The playground's own network: one bridge per subnet, in a namespace that routes between them.

The machine's own network namespace stays unchanged: no interface, no address, no rule.
"""

import asyncio
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal, TypeAlias

import msgspec

from skep.errors import AlreadyExists, FailedPrecondition
from skep.playground import names
from skep.playground.commands import find, run

Way: TypeAlias = Literal["in", "out"]
"""Direction of packets: to the node, or from it."""

NETNS_ROOT = Path("/run/netns")
"""Directory where ``ip netns`` pins namespaces.  ``ip link`` looks up names of namespaces in it."""


class _Address(msgspec.Struct):
    """An address in the output of ``ip -j addr``."""

    family: str
    local: str = ""
    prefixlen: int = 0


class _Link(msgspec.Struct):
    """An interface in the output of ``ip -j addr``."""

    ifname: str
    addr_info: list[_Address] = []


def namespaces(playground: str) -> list[str]:
    """Return the pinned namespaces that belong to ``playground``, sorted."""
    try:
        found = os.listdir(NETNS_ROOT)
    except FileNotFoundError:
        return []
    return sorted(name for name in found if names.node_of_namespace(playground, name))


async def make_switch(playground: str, subnets: int) -> None:
    """Create the namespace with one bridge per subnet.  Raises: AlreadyExists: a playground has this name."""
    if namespaces(playground):
        raise AlreadyExists(
            f"a playground called {playground} is up, or was not removed completely: choose another --name, "
            "or run skep playground down"
        )
    switch = names.namespace(playground, names.SWITCH)
    await run("ip", "netns", "add", switch)
    lines = ["link set lo up"]
    for subnet in range(subnets):
        gateway = names.UnderlayAddress(subnet=subnet, host=1).ip
        lines += [
            f"link add br{subnet} type bridge",
            f"addr add {gateway}/24 dev br{subnet}",
            f"link set br{subnet} up",
        ]
    await _batch(switch, lines)
    await _forward(switch)


async def attach(playground: str, node: str, address: names.UnderlayAddress) -> None:
    """Create the node's namespace, with a cable (``eth0``) to its subnet's bridge."""
    switch, own = names.namespace(playground, names.SWITCH), names.namespace(playground, node)
    port = names.port(node)
    await run("ip", "netns", "add", own)
    await _batch(
        switch,
        [
            f"link add {port} type veth peer name eth0 netns {own}",
            f"link set {port} master br{address.subnet} up",
        ],
    )
    await _batch(
        own,
        [
            "link set lo up",
            f"addr add {address.ip}/24 dev eth0",
            "link set eth0 up",
            # No default route: outside addresses are unreachable immediately, instead of after a resolver's timeout.
            f"route add {names.UNDERLAY} via {address.gateway}",
        ],
    )


async def restart_network(playground: str, node: str, address: str) -> None:
    """Remove all interfaces and IPv4 addresses that a machine has not got when it boots.

    The kernel keeps the namespaces of killed containers for minutes, until their connections have timed out.  Their
    interfaces would still receive packets for their addresses, which new containers get as well.
    """
    own = names.namespace(playground, node)
    links = msgspec.json.decode(await _inside(own, "ip", "-j", "addr"), type=list[_Link])
    words = [f"link del {one.ifname}" for one in links if one.ifname not in ("lo", "eth0")]
    words += [
        f"addr del {found.local}/{found.prefixlen} dev eth0"
        for one in links
        if one.ifname == "eth0"
        for found in one.addr_info
        if found.family == "inet" and found.local != address
    ]
    if words:
        with suppress(FailedPrecondition):  # the end of a pair disappears with the other one
            await _batch(own, words, "-force")


async def set_cable(playground: str, node: str, *, connected: bool) -> None:
    """Unplug the node's link at the switch, or plug it in again.  Its peers receive no TCP reset."""
    switch = names.namespace(playground, names.SWITCH)
    await _inside(switch, "ip", "link", "set", names.port(node), "up" if connected else "down")


async def block(playground: str, node: str, way: Way) -> None:
    """Drop all packets in the direction ``way``.  The other direction stays open.  Idempotent."""
    port = names.port(node)
    if way == "out":
        netns, device = names.namespace(playground, names.SWITCH), port
    else:
        netns, device = names.namespace(playground, node), "eth0"
    table = _table(port)
    rules = (
        f"table netdev {table} {{}}\ndelete table netdev {table}\n"
        f"table netdev {table} {{\n  chain lost {{\n"
        f'    type filter hook ingress device "{device}" priority 0; policy drop;\n  }}\n}}\n'
    )
    await _inside(netns, "nft", "-f", "-", stdin=rules.encode())


async def unblock(playground: str, node: str) -> None:
    """Let packets pass in both directions again."""
    table = _table(names.port(node))
    for netns in (names.SWITCH, node):
        namespace = names.namespace(playground, netns)
        rules = f"table netdev {table} {{}}\ndelete table netdev {table}\n"
        await _inside(namespace, "nft", "-f", "-", stdin=rules.encode())


async def is_blocked(playground: str, node: str) -> bool:
    """Return whether packets are dropped in one direction."""
    table = f"table netdev {_table(names.port(node))}".encode()
    for netns in (names.SWITCH, node):
        namespace = names.namespace(playground, netns)
        if table in await _inside(namespace, "nft", "list", "tables"):
            return True
    return False


def _table(port: str) -> str:
    return f"cut-{port}"


async def is_connected(playground: str, node: str) -> bool:
    """Return whether the cable is plugged in."""
    switch = names.namespace(playground, names.SWITCH)
    return b"state UP" in await _inside(switch, "ip", "link", "show", names.port(node))


async def remove(playground: str) -> None:
    """Unpin every namespace of the playground.

    A namespace disappears with its interfaces when its last process ends.
    """
    async with asyncio.TaskGroup() as group:
        for name in namespaces(playground):
            group.create_task(run("ip", "netns", "del", name))


def root_is_mounted() -> bool:
    """Return whether ``ip netns`` was already used on this machine, which has made its directory a mount."""
    # Not os.path.ismount, which cannot detect a directory that is mounted on itself.
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    return any(line.split()[4] == str(NETNS_ROOT) for line in mounts)


async def remove_root() -> None:
    """Remove the mount that ``ip netns`` made, unless it contains other namespaces."""
    if root_is_mounted() and not os.listdir(NETNS_ROOT):
        await run("umount", str(NETNS_ROOT))
        NETNS_ROOT.rmdir()


async def _forward(namespace: str) -> None:
    """Enable routing in the namespace.  /proc/sys/net shows the network namespace of the opening process."""
    await _inside(namespace, "sh", "-c", "echo 1 >/proc/sys/net/ipv4/ip_forward")


async def _batch(namespace: str, lines: Sequence[str], *options: str) -> None:
    """Run the lines with ``ip`` in one process, which stops at the first failure unless an option says otherwise."""
    await _inside(namespace, "ip", *options, "-batch", "-", stdin=("\n".join(lines) + "\n").encode())


async def _inside(namespace: str, command: str, *words: str, stdin: bytes = b"") -> bytes:
    """Run a command in the namespace, and return its standard output.

    Not with ``ip -n``, which also mounts /sys again.  Debian's SELinux policy denies it that.
    """
    return await run("nsenter", f"--net={NETNS_ROOT / namespace}", find(command), *words, stdin=stdin)

"""The network interfaces of this machine, as ``docker swarm init`` chooses its address among them."""

import asyncio
import ipaddress
from typing import Any

import msgspec

from skep.api.swarm_requests import Interface, Interfaces
from skep.errors import Unavailable
from skep.linux.commands import communicate

_TIMEOUT_S = 5.0
_KINDS_OF_OURS = frozenset({"bridge", "vxlan", "ifb", "dummy"})
"""Kinds of link that carry containers; a machine's own address may lie on a veth (it is a container itself)."""


async def read_interfaces() -> Interfaces:
    """Every interface with its addresses, by name.  Raises: Unavailable: ``ip`` does not answer."""
    try:
        process = await asyncio.create_subprocess_exec(
            *("ip", "-details", "-json", "address", "show"),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        output, _ = await communicate(process, _TIMEOUT_S)
    except (OSError, TimeoutError) as error:
        raise Unavailable(f"the addresses of this machine cannot be read: {error}") from error
    return parse_interfaces(output)


def parse_interfaces(output: bytes) -> Interfaces:
    """What ``ip -details -json address show`` printed.

    Where a real device has an address, bridges and the like are left out of the choice, as the engine does.
    """
    links: list[dict[str, Any]] = [
        link for link in msgspec.json.decode(output or b"[]") if link.get("ifname")
    ]
    return {link["ifname"]: _interface(link) for link in links}


def _interface(link: dict[str, Any]) -> Interface:
    flags = link.get("flags", ())
    return Interface(
        addresses=tuple(
            ipaddress.ip_address(info["local"]) for info in link.get("addr_info", ()) if "local" in info
        ),
        is_up="UP" in flags,
        is_loopback="LOOPBACK" in flags,
        is_ours=link.get("linkinfo", {}).get("info_kind") in _KINDS_OF_OURS,
    )

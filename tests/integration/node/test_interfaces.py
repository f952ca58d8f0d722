"""The interfaces of a machine with overlays: what some versions of iproute2 print no JSON of."""

import asyncio
import subprocess
from ipaddress import ip_address
from pathlib import Path

import pytest

from skep.dataplane.netns.kernel.namespaces import Namespaces
from skep.node.host.machine import read_interfaces

pytestmark = pytest.mark.needs("root", "ip")


async def test_a_vxlan_device_is_one_of_ours(tmp_path: Path) -> None:
    namespaces = Namespaces(tmp_path / "ns")
    machine = await namespaces.create("machine", {})
    try:
        for command in ("link add vx0 type vxlan id 7 dstport 4789", "addr add 192.0.2.9/24 dev vx0"):
            ip = ["nsenter", f"--net={machine}", "ip", *command.split()]
            await asyncio.to_thread(subprocess.run, ip, check=True)
        found = await namespaces.run(machine, asyncio.run, read_interfaces())
    finally:
        await namespaces.destroy("machine")
        namespaces.close()
    assert found["vx0"].is_ours
    assert found["vx0"].addresses == (ip_address("192.0.2.9"),)

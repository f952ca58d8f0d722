"""Removes every kernel object in Skep's namespaces, one by one, and waits until each is back.

The objects are listed by the kernel instead of a fixed list, so that a new kind of object is tested automatically.
"""

import json
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

from skep.dataplane.netns.kernel.namespaces import Namespaces
from skep.model.networks.tables import NetworkHead, Segment
from skep.model.values.ids import NetworkId
from tests.support.encryption.secure_lab import secure_lab
from tests.support.networks.overlay_lab import DUAL, INGRESS, place, shell, try_shell

SECRET = NetworkHead(
    id=NetworkId("secretnet"),
    name="secret",
    segments=(Segment("10.0.5.0/24", "10.0.5.1", 4101),),
    is_encrypted=True,
)
SETTINGS = (
    "net/ipv4/conf",
    "net/ipv6/conf",
    "net/ipv4/ip_forward",
    "net/ipv4/tcp_fwmark_accept",
    "net/bridge",
    "net/netfilter",
)
LISTINGS = (
    "ip -j -d link",
    "ip -j addr",
    *(f"ip -{version} -j route show table all" for version in (4, 6)),
    *(f"ip -{version} -j rule" for version in (4, 6)),
    *(f"ip -{version} -j neigh show nud permanent" for version in (4, 6)),
    "bridge -j fdb",
    "nft -j list ruleset",
)
PLACES = ("overlay", "encrypted", "home", "container")
PATIENCE_SECONDS = 60.0
"""Seconds until an object counts as lost, on a busy machine.  Otherwise all are back within 5 s
(``bench.healing``).
"""
FOLLOWS = frozenset(
    {"mtu", "forwarding", "accept_redirects", "mc_forwarding", "stable_secret", "nf_conntrack_count"}
)
"""Settings that follow others, as the kernel writes ``accept_redirects`` with ``ip_forward``, or are read-only."""


Inventory = dict[str, list[str]]
"""Objects with all their relevant properties, and the commands that remove each."""


class Healed(NamedTuple):
    """One object was removed by ``command``.

    ``seconds``: time until everything was restored, or None if it was not.  Then ``difference`` shows what differs.
    """

    name: str
    command: str
    seconds: float | None
    difference: str = ""


@asynccontextmanager
async def healing_lab(directory: Path) -> AsyncIterator[Mapping[str, Path]]:
    """Run two nodes, each with a container on plain, encrypted and ingress networks.  Yield the first's namespaces by
    name.
    """
    async with secure_lab(directory, 2) as secure:
        lab, networks = secure.lab, secure.networks
        ends = []
        for number, (node, network) in enumerate(zip(lab.nodes, networks, strict=True), 5):
            ends.append(
                await node.attach(
                    network,
                    place(INGRESS, f"10.0.0.{number}/24"),
                    place(DUAL, f"10.0.4.{number}/24", f"fd04::{number}/64"),
                    place(SECRET, f"10.0.5.{number}/24"),
                )
            )
        for head in (DUAL, SECRET):
            lab.tell(head)
        lab.tell(INGRESS, ingress_addresses={"n1": "10.0.0.2", "n2": "10.0.0.3"})
        await lab.apply(networks)
        overlays = lab.nodes[0].paths.overlays
        yield {
            "overlay": overlays / DUAL.id,
            "encrypted": overlays / SECRET.id,
            "home": lab.nodes[0].home,
            "container": Path(ends[0].netns),
        }


async def taken_away(spaces: Mapping[str, Path], where: str) -> AsyncIterator[Healed]:
    """Remove every object in one of the namespaces of ``healing_lab``, one after the other."""
    space = spaces[where]
    fresh = await fresh_settings(spaces["home"])
    before = await steady(space, fresh, where)
    assert len(before) > 15, "there is something to be taken away"
    for name, commands in before.items():
        for command in commands:
            code, output = await try_shell(space, command)
            assert code == 0, f"{command} (of {name}): {output}"
            began = time.monotonic()
            while (after := await inventory(space, fresh, where)).keys() != before.keys():
                if time.monotonic() - began > PATIENCE_SECONDS:
                    yield Healed(name, command, None, str(sorted(before.keys() ^ after.keys())))
                    before = after
                    break
            else:
                yield Healed(name, command, time.monotonic() - began)


async def steady(space: Path, fresh: dict[str, str], where: str) -> Inventory:
    """Return the inventory once it no longer changes."""
    found = await inventory(space, fresh, where)
    deadline = time.monotonic() + 10
    while (again := await inventory(space, fresh, where)) != found:
        assert time.monotonic() < deadline, "the namespace does not come to rest"
        found = again
    return found


async def inventory(space: Path, fresh: dict[str, str], where: str) -> Inventory:
    """Return all objects of ours, or an empty inventory if they changed meanwhile.

    The node's own namespace also has objects of others.
    """
    listed = await shell(space, "; echo @@; ".join(f"{one} 2>/dev/null" for one in LISTINGS))
    try:
        parts = [json.loads(text) if text.strip() else [] for text in listed.split("@@\n")]
    except json.JSONDecodeError:  # an interface was removed while it was listed
        return {}
    links, addresses, routes4, routes6, rules4, rules6, neighbors4, neighbors6, fdb, nft = parts
    ours = {one["ifname"] for one in links if is_ours(one["ifname"], where)}
    bridges = {one["ifname"] for one in links if one.get("linkinfo", {}).get("info_kind") == "bridge"} & ours
    found: Inventory = {}
    for one in links:
        if one["ifname"] in ours:
            found |= link(one)
    for one in addresses:
        if one["ifname"] in ours:
            for held in one["addr_info"]:
                if where == "home" and held["scope"] == "link":
                    continue  # its IPv6 setting belongs to the machine
                text = f"{held['local']}/{held['prefixlen']} dev {one['ifname']}"
                found[f"address {text} {held['scope']}"] = [f"ip addr del {text}"]
    for version, routes in ((4, routes4), (6, routes6)):
        for one in routes:
            is_machines = where == "home" and one["dst"].startswith(("fe80:", "ff00:", "multicast"))
            if one.get("dev") in ours and not is_machines:
                found |= route(version, one)
    if where != "home":
        for version, rules in ((4, rules4), (6, rules6)):
            for one in rules:
                text = f"pref {one['priority']}"
                found[f"rule {version} {text} {one.get('fwmark')} {one['table']}"] = [
                    f"ip -{version} rule del {text} lookup {one['table']}"
                ]
    for one in (*neighbors4, *neighbors6):
        if one.get("dev") in ours:
            text = f"{one['dst']} dev {one['dev']}"
            found[f"neighbor {text} {one['lladdr']}"] = [f"ip neigh del {text}"]
    for one in fdb:
        if one["ifname"] in ours and (one["state"] == "static" or "dst" in one):
            found |= forwarding(one)
        elif one["ifname"] in bridges and one.get("master") == one["ifname"] and "vlan" not in one:
            text = f"{one['mac']} dev {one['ifname']}"
            found[f"own entry {text}"] = [f"bridge fdb del {text} self"]
    found |= rule_tables(nft)
    settings = await Namespaces(space.parent).run(space, read_settings)
    return found | changed_settings(settings, fresh, ours, where)


def is_ours(link: str, where: str) -> bool:
    match where:
        case "home":
            return link.startswith(("skep-", "vs"))
        case "container":
            return True
        case _:
            return link != "lo"


def link(one: dict[str, Any]) -> Inventory:
    name, master = one["ifname"], one.get("master", "")
    kind = one.get("linkinfo", {}).get("info_kind", "")
    port = one.get("linkinfo", {}).get("info_slave_data", {})
    mac = one["address"] if kind == "bridge" or name.startswith("eth") else ""
    closed = (port.get("learning"), port.get("flood"))
    text = f"link {name} {kind} mtu {one['mtu']} {'UP' in one['flags']} in {master} {mac} {closed}"
    commands = [f"ip link set {name} down", f"ip link set {name} mtu {one['mtu'] - 96}"]
    if name != "lo":
        commands.append(f"ip link del {name}")
    if master:
        commands += [f"ip link set {name} nomaster", f"bridge link set dev {name} learning on flood on"]
    if mac:
        commands.append(f"ip link set {name} address 02:00:00:00:00:77")
    return {text: commands}


def route(version: int, one: dict[str, Any]) -> Inventory:
    kind, table = one.get("type", "unicast"), one.get("table", "main")
    destination = one["dst"] if one["dst"] != "default" else ("0.0.0.0/0" if version == 4 else "::/0")
    text = f"{kind} {destination} dev {one['dev']} table {table}"
    return {
        f"route {version} {text} by {one.get('gateway')} from {one.get('prefsrc')}": [
            f"ip -{version} route del {text}"
        ]
    }


def forwarding(one: dict[str, Any]) -> Inventory:
    text = f"{one['mac']} dev {one['ifname']}"
    where = f"dst {one['dst']} self" if "dst" in one else "master"
    return {f"forwarding {text} {where}": [f"bridge fdb del {text} {where}"]}


def rule_tables(listed: Any) -> Inventory:
    found: Inventory = {}
    for one in listed.get("nftables", ()) if listed else ():
        match one:
            case {"table": table}:
                name = f"{table['family']} {table['name']}"
                found[f"table {name}"] = [f"nft delete table {name}"]
            case {"chain": chain}:
                name = f"{chain['family']} {chain['table']} {chain['name']}"
                rules = [
                    json.dumps(each["rule"]["expr"], sort_keys=True)
                    for each in listed["nftables"]
                    if "rule" in each
                    and each["rule"]["chain"] == chain["name"]
                    and each["rule"]["table"] == chain["table"]
                    and each["rule"]["family"] == chain["family"]
                ]
                found[f"chain {name} {len(rules)} rules"] = [f"nft flush chain {name}"] if rules else []
            case {"set": held} | {"map": held} if held.get("elem"):
                name = f"{held['family']} {held['table']} {held['name']}"
                kind = "set" if "set" in one else "map"
                found[f"{kind} {name} {sorted(map(str, held['elem']))}"] = [f"nft flush {kind} {name}"]
    return found


# --- settings -----------------------------------------------------------------------------------------------------


def read_settings() -> dict[str, str]:
    """Return those settings of the current namespace that a network can have."""
    found = {}
    for setting in SETTINGS:
        root = Path("/proc/sys", setting)
        for path in [root] if root.is_file() else root.rglob("*"):
            if path.is_file() and path.name not in FOLLOWS:
                try:
                    found[str(path.relative_to("/proc/sys"))] = path.read_text().strip()
                except OSError:
                    continue
    return found


async def fresh_settings(home: Path) -> dict[str, str]:
    """Return the settings of a new namespace."""
    spaces = Namespaces(home.parent)
    space = await spaces.create("fresh", {})
    try:
        return await spaces.run(space, read_settings)
    finally:
        await spaces.destroy("fresh")
        spaces.close()


def changed_settings(
    settings: dict[str, str], fresh: dict[str, str], ours: Iterable[str], where: str
) -> Inventory:
    """Return settings that differ from a new namespace's, or for an interface from any new interface's here."""
    found: Inventory = {}
    for name, value in settings.items():
        words = name.split("/")
        is_of_device = len(words) > 3 and words[2] == "conf" and words[3] not in ("all", "default", "lo")
        if (
            (words[3:4] == ["lo"] and "lo" not in ours)
            or (is_of_device and words[3] not in ours)
            or (where == "home" and not is_of_device)
        ):
            continue
        default = "/".join([*words[:3], "default", *words[4:]])
        usual = settings.get(default, value) if is_of_device else fresh.get(name, value)
        if value != usual:
            found[f"setting {name} {value}"] = [f"echo {usual} > /proc/sys/{name}"]
    return found

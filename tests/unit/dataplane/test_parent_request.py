"""Networks on a device of the machine, as users ask for them."""

import asyncio
from pathlib import Path

import pytest

from skep.aio.clock import SystemClock
from skep.api.errors import Forbidden
from skep.api.formats.networks import IPAMBody, NetworkBody, SubnetBody
from skep.dataplane.local.endpoints import LocalEndpoints
from skep.dataplane.local.networks import LocalNetworks
from skep.dataplane.local.objects import LocalNetwork, flat_form, head_of
from skep.dataplane.local.parent_request import parent_network_of
from skep.errors import NotFound, SkepError
from skep.model.network import ConfigReference
from skep.model.networks.sandbox import EndpointConfig, EndpointRequest, SandboxConfig
from skep.model.networks.tables import ParentLink
from skep.model.values.ids import ContainerId, new_container_id
from skep.model.values.times import Timestamp

LAN = IPAMBody(config=(SubnetBody(subnet="10.77.0.0/24", ip_range="10.77.0.64/26"),))


def made(
    driver: str = "macvlan", *, others: tuple[LocalNetwork, ...] = (), ipam: IPAMBody = LAN, **options: str
) -> LocalNetwork:
    named = {
        name.replace("__", "."): value for name, value in ({"parent": "eth0"} | options).items() if value
    }
    body = NetworkBody(name="lan", driver=driver, ipam=ipam, options=named)
    return parent_network_of(
        body,
        id="a" * 64,
        created_at=Timestamp(""),
        others=others,
        devices=["lo", "eth0", "eth1", "eth1234567890"],
    )


@pytest.mark.parametrize(
    ("driver", "options", "mode"),
    [
        ("macvlan", {}, "bridge"),
        ("macvlan", {"macvlan_mode": "private"}, "private"),
        ("ipvlan", {}, "l2"),
        ("ipvlan", {"ipvlan_mode": "l3s"}, "l3s"),
    ],
)
def test_containers_are_on_the_parent_in_the_drivers_mode(driver, options, mode):
    head = head_of(made(driver, **options))
    assert head.parent == ParentLink(kind=driver, device="eth0", mode=mode)
    assert head.segments[0].gateway == "10.77.0.64", "the first address of the range"
    assert head.mtu == 0


@pytest.mark.parametrize(
    ("driver", "options", "words"),
    [
        ("macvlan", {"parent": "lo"}, "loopback interface is not a valid macvlan parent link"),
        ("macvlan", {"parent": "eth9"}, "invalid subinterface vlan name eth9, example formatting is eth0.10"),
        ("macvlan", {"parent": "e" * 99}, f"invalid subinterface vlan name {'e' * 40}, example"),
        ("macvlan", {"parent": "eth0.x"}, "unable to parse a valid vlan id from: x"),
        ("macvlan", {"parent": "eth9.10"}, "-o parent interface does was not found on the host: eth9"),
        ("ipvlan", {"parent": "eth0.4095"}, "vlan id must be between 1-4094, received: 4095"),
        ("ipvlan", {"parent": "eth0.0"}, "vlan id must be between 1-4094, received: 0"),
        ("ipvlan", {"parent": "eth0.10.20"}, "unable to parse a valid vlan id from: 10.20"),
        (
            "macvlan",
            {"parent": "eth1234567890.10"},
            "failed to create eth1234567890.10 vlan link: the name has more than 15 characters",
        ),
        (
            "macvlan",
            {"macvlan_mode": "x"},
            "requested macvlan mode 'x' is not valid, 'bridge' mode is the macvlan",
        ),
        ("ipvlan", {"ipvlan_mode": "l4"}, "requested ipvlan mode 'l4' is not valid, 'l2' mode is the ipvlan"),
        ("macvlan", {"ipvlan_mode": "l2"}, "do not have the option ipvlan_mode=l2"),
        (
            "macvlan",
            {"com__docker__network__driver__mtu": "x"},
            "invalid value for com.docker.network.driver.mtu",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(driver, options, words):
    with pytest.raises(SkepError, match=words):
        made(driver, **options)


def test_a_network_without_a_subnet_has_a_free_one_of_dockers_pool():
    first = made(ipam=IPAMBody(), parent="eth1")
    assert [one.subnet for one in first.configs] == ["172.18.0.0/16"]
    assert flat_form(first, {})["IPAM"]["Config"] == list(first.configs)
    assert made(others=(first,), ipam=IPAMBody()).configs[0].subnet == "172.19.0.0/16"


def test_a_gateway_that_was_not_named_is_not_shown():
    (shown,) = flat_form(made(), {})["IPAM"]["Config"]
    assert shown == LAN.config[0]


def test_a_parent_has_one_network_of_each_driver():
    first, elsewhere = made(), IPAMBody(config=(SubnetBody(subnet="10.78.0.0/24"),))
    with pytest.raises(SkepError, match="network dm-aaaaaaaaaaaa is already using parent interface eth0"):
        made(others=(first,), ipam=elsewhere)
    assert made("ipvlan", others=(first,), ipam=elsewhere)
    assert made(others=(first,), ipam=elsewhere, parent="eth1")


@pytest.mark.parametrize(("subnet", "part"), [("10.77.0.0/24", ""), ("10.77.0.0/16", "10.77.1.0/24")])
def test_a_subnet_belongs_to_one_network_whatever_its_parent(subnet, part):
    again = IPAMBody(config=(SubnetBody(subnet=subnet, ip_range=part),))
    with pytest.raises(Forbidden, match="Pool overlaps with other one on this address space"):
        made(others=(made(),), ipam=again, parent="eth1")


def test_ranges_of_one_subnet_are_two_networks():
    other = IPAMBody(config=(SubnetBody(subnet="10.77.0.0/24", ip_range="10.77.0.128/26"),))
    assert made(others=(made(),), ipam=other, parent="eth1")


@pytest.mark.parametrize(("driver", "dummy"), [("macvlan", "dm-aaaaaaaaaaaa"), ("ipvlan", "di-aaaaaaaaaaaa")])
def test_a_vlan_that_is_not_there_and_a_parent_that_is_not_named_are_made(driver, dummy):
    assert head_of(made(driver)).parent.made == "", "it is the machine's"
    vlan = head_of(made(driver, parent="eth0.10"))
    assert (vlan.parent.device, vlan.parent.made, vlan.is_internal) == ("eth0.10", "vlan", False)
    alone = head_of(made(driver, parent=""))
    assert (alone.parent.device, alone.parent.made, alone.is_internal) == (dummy, "dummy", True)
    assert alone.gateway == "", "it leads nowhere"


class Devices:
    """The machine's devices that networks have made."""

    def __init__(self) -> None:
        self.present: set[str] = set()
        self.error: SkepError | None = None
        self.may_end = asyncio.Event()
        self.may_end.set()

    async def make(self, parent: ParentLink) -> None:
        if self.error is not None:
            raise self.error
        self.present.add(parent.device)

    async def remove(self, parent: ParentLink) -> None:
        await self.may_end.wait()
        self.present.remove(parent.device)


class NoContainers:
    """A gateway bridge without containers."""

    bridge, subnet = "br", None

    def users(self) -> tuple[str, ...]:
        return ()

    async def move(self, subnet: object) -> None:
        raise AssertionError


async def test_a_device_that_was_made_goes_with_the_last_network_on_it(tmp_path: Path) -> None:
    devices = Devices()
    local = LocalNetworks(
        tmp_path / "local", NoContainers(), devices, clock=SystemClock(), new_id=new_container_id
    )

    async def add(driver: str, subnet: str, parent: str) -> str:
        ipam = IPAMBody(config=(SubnetBody(subnet=subnet),))
        options = {"parent": parent} if parent else {}
        body = NetworkBody(name=f"{driver}{parent}", driver=driver, ipam=ipam, options=options)
        return (await local.add(body, (), ["eth0", *devices.present])).id

    first = await add("macvlan", "10.1.0.0/24", "eth0.10")
    second = await add("ipvlan", "10.2.0.0/24", "eth0.10")
    third = await add("macvlan", "10.3.0.0/24", "")
    assert devices.present == {"eth0.10", f"dm-{third[:12]}"}
    await local.remove_bridge(first)
    await local.remove_bridge(third)
    assert devices.present == {"eth0.10"}, "the second network is on it"
    await local.remove_bridge(second)
    assert not devices.present
    devices.error = SkepError("failed to create eth0.10 vlan link")
    with pytest.raises(SkepError, match="failed to create"):
        await add("macvlan", "10.1.0.0/24", "eth0.10")
    assert not local.bridges(), "a network whose device cannot be made is none"


async def test_a_container_that_was_created_before_the_last_one_left_starts_on_the_network(
    tmp_path: Path,
) -> None:
    """Between the preparation of a task and its attachment, the last task on the network may end."""
    devices = Devices()
    local = LocalNetworks(
        tmp_path / "local", NoContainers(), devices, clock=SystemClock(), new_id=new_container_id
    )
    local.add_configuration(
        NetworkBody(name="lan", config_only=True, ipam=LAN, options={"parent": "eth0.10"})
    )
    body = NetworkBody(name="web", driver="macvlan", config_from=ConfigReference(network="lan"))
    endpoints = LocalEndpoints(local, tmp_path / "tables", None)
    made = local.of_cluster("c1", body, ["eth0"], endpoints.is_used)
    wanted = EndpointConfig(head=head_of(made), addresses=())
    old, new = (SandboxConfig(id=ContainerId(one * 64), name=one) for one in "on")
    first = await endpoints.fill(old, wanted)
    devices.present.add("eth0.10")  # by the container
    devices.may_end.clear()
    leaving = asyncio.ensure_future(endpoints.give_back(old.id, first))
    await asyncio.sleep(0)
    starting = asyncio.ensure_future(endpoints.fill(new, wanted))
    await asyncio.sleep(0)
    assert not starting.done(), "the device is being removed"
    devices.may_end.set()
    await leaving
    second = await starting
    (present,) = local.all()
    assert (second.head, second.addresses) == (head_of(present), first.addresses)
    assert present.cluster_id == "c1"
    assert endpoints.is_used(present.id)
    again = LocalNetworks(tmp_path / "local", NoContainers(), clock=SystemClock(), new_id=new_container_id)
    assert await again.for_start(made.id, ["eth0"], lambda _: True) == present, "after a restart of the node"
    with pytest.raises(NotFound):
        await local.for_start("0" * 64, ["eth0"], endpoints.is_used)


async def test_a_network_that_a_starting_container_has_joined_is_not_removed(tmp_path: Path) -> None:
    """The container does not run yet.  Without its network, its address and its names would be given to others."""
    local = LocalNetworks(tmp_path / "local", NoContainers(), clock=SystemClock(), new_id=new_container_id)
    endpoints = LocalEndpoints(local, tmp_path / "tables", None)
    front = await local.add(NetworkBody(name="front"), (), ())
    starting = SandboxConfig(id=ContainerId("c" * 64), name="c")
    joined = await endpoints.take(starting, front, EndpointRequest(network=front.id))
    with pytest.raises(Forbidden, match=f"network front id {front.id} has active endpoints"):
        await local.remove_bridge(front.id)
    assert endpoints.find("front") == front
    await endpoints.give_back(starting.id, joined)
    await local.remove_bridge(front.id)
    assert endpoints.find("front") is None


async def test_a_configuration_in_use_is_not_removed(tmp_path: Path) -> None:
    local = LocalNetworks(tmp_path / "local", None, clock=SystemClock(), new_id=new_container_id)
    kept = local.add_configuration(
        NetworkBody(name="lan", config_only=True, ipam=LAN, options={"parent": "eth0"})
    )
    body = NetworkBody(name="web", driver="macvlan", config_from=ConfigReference(network="lan"))
    network = local.of_cluster("c1", body, ["eth0"], lambda network: True)
    with pytest.raises(Forbidden, match='configuration network "lan" is in use'):
        local.remove_configuration(kept.id)
    await local.remove_bridge(network.id)
    local.remove_configuration(kept.id)
    assert not local.configurations()


def test_a_network_of_the_cluster_that_no_container_came_to_gives_its_device_back(tmp_path: Path) -> None:
    """Its task failed after the network was made, and the network was removed from the cluster since."""
    local = LocalNetworks(tmp_path / "local", None, clock=SystemClock(), new_id=new_container_id)
    for name, device in (("lan", "eth0"), ("wan", "eth1")):
        local.add_configuration(
            NetworkBody(name=name, config_only=True, ipam=LAN, options={"parent": device})
        )
    lan, wan = (
        NetworkBody(name=name, driver="macvlan", config_from=ConfigReference(network=name))
        for name in ("lan", "wan")
    )
    devices = ["eth0", "eth1"]
    first = local.of_cluster("c1", lan, devices, lambda network: False)
    other = local.of_cluster("c2", wan, devices, lambda network: False)
    with pytest.raises(Forbidden, match="is already using parent interface eth0"):
        local.of_cluster("c3", lan, devices, lambda network: network == first.id)
    again = local.of_cluster("c3", lan, devices, lambda network: False)
    assert local.all() == [other, again], "what is about to be used on another device stays"

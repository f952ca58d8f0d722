"""Networks on a device of the machine, as users ask for them."""

from pathlib import Path

import pytest

from skep.aio.clock import SystemClock
from skep.api.errors import Forbidden
from skep.api.networks import IPAMBody, NetworkBody, SubnetBody
from skep.dataplane.local.networks import LocalNetworks
from skep.dataplane.local.objects import LocalNetwork, head_of
from skep.dataplane.local.parent_request import parent_network_of
from skep.errors import SkepError
from skep.model.ids import new_container_id
from skep.model.network import ConfigReference
from skep.model.tables import ParentLink
from skep.model.times import Timestamp

LAN = IPAMBody(config=(SubnetBody(subnet="10.77.0.0/24", ip_range="10.77.0.64/26"),))


def made(
    driver: str = "macvlan", *, others: tuple[LocalNetwork, ...] = (), ipam: IPAMBody = LAN, **options: str
) -> LocalNetwork:
    named = {
        name.replace("__", "."): value for name, value in ({"parent": "eth0"} | options).items() if value
    }
    body = NetworkBody(name="lan", driver=driver, ipam=ipam, options=named)
    return parent_network_of(
        body, id="a" * 64, created_at=Timestamp(""), others=others, devices=["lo", "eth0", "eth1"]
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
    assert head.segments[0].gateway == "10.77.0.1"
    assert head.mtu == 0


@pytest.mark.parametrize(
    ("driver", "options", "words"),
    [
        ("macvlan", {"parent": ""}, "needs a parent interface"),
        ("macvlan", {"parent": "lo"}, "loopback interface is not a valid macvlan parent link"),
        ("macvlan", {"parent": "eth9"}, "the parent interface is not there"),
        ("macvlan", {"parent": "e" * 16}, "the parent interface is not there"),
        (
            "macvlan",
            {"macvlan_mode": "x"},
            "requested macvlan mode 'x' is not valid, 'bridge' mode is the macvlan",
        ),
        ("ipvlan", {"ipvlan_mode": "l4"}, "requested ipvlan mode 'l4' is not valid, 'l2' mode is the ipvlan"),
        ("macvlan", {"ipvlan_mode": "l2"}, "do not know the option ipvlan_mode=l2"),
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


def test_a_network_without_a_subnet_is_refused():
    with pytest.raises(SkepError, match="needs the subnet"):
        made(ipam=IPAMBody())


def test_a_parent_has_one_network():
    first = made()
    with pytest.raises(SkepError, match="network aaaaaaaaaaaa is already using parent interface eth0"):
        made(others=(first,))
    assert made(others=(first,), parent="eth1")


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

"""What the options of an overlay network say."""

from msgspec.structs import replace

from skep.model.network import IPAMConfig, IPAMOptions
from skep.model.networks.overlays import VXLAN_OPTION, head_of, vxlan_ids
from skep.model.networks.tables import Segment
from skep.model.values.ids import NetworkId
from skep.model.values.meta import Driver
from tests.support.builders import an_overlay


def test_the_head_says_what_the_network_is_made_of() -> None:
    options = {
        "com.docker.network.driver.overlay.vxlanid_list": "4097,4098",
        "com.docker.network.driver.mtu": "1400",
        "encrypted": "",
    }
    configs = (
        IPAMConfig(subnet="10.1.0.0/24", gateway="10.1.0.1"),
        IPAMConfig(subnet="10.2.0.0/24", gateway="10.2.0.1/24"),
    )
    network = replace(
        an_overlay("net2", subnet="", internal=True),
        id=NetworkId("i2"),
        driver_state=Driver(name="overlay", options=options),
        ipam_options=IPAMOptions(configs=configs),
    )
    head = head_of(network, 4790)
    assert head.segments == (
        Segment(subnet="10.1.0.0/24", gateway="10.1.0.1", vni=4097),
        Segment(subnet="10.2.0.0/24", gateway="10.2.0.1", vni=4098),
    )
    assert (head.id, head.name, head.mtu, head.port) == ("i2", "net2", 1400, 4790)
    assert (head.is_internal, head.is_encrypted, head.is_ingress) == (True, True, False)
    plain = head_of(replace(network, driver_state=Driver(options={"com.docker.network.driver.mtu": "-1"})), 1)
    assert (plain.mtu, plain.is_encrypted, plain.segments) == (0, False, ())


def test_subnets_of_both_versions_are_carried_by_one_vxlan() -> None:
    configs = (
        IPAMConfig(subnet="10.0.1.0/24", gateway="10.0.1.1"),
        IPAMConfig(subnet="10.0.2.0/24", gateway="10.0.2.1"),
        IPAMConfig(subnet="fd00:1::/64", gateway="fd00:1::1"),
    )
    network = an_overlay("net1")
    options = {**network.driver_state.options, "com.docker.network.driver.overlay.vxlanid_list": "4097,4098"}
    both = replace(
        network,
        driver_state=replace(network.driver_state, options=options),
        ipam_options=IPAMOptions(driver=Driver(name="default"), configs=configs),
    )
    assert [(one.subnet, one.vni) for one in head_of(both, 4789).segments] == [
        ("10.0.1.0/24", 4097),
        ("10.0.2.0/24", 4098),
        ("fd00:1::/64", 4097),
    ]


def test_what_makes_no_sense_counts_as_not_said() -> None:
    assert vxlan_ids({VXLAN_OPTION: "4097, 4098,,x,-1,\u00b2,99999999999"}) == [4097, 4098]
    network = replace(
        an_overlay("net1"), ipam_options=IPAMOptions(configs=(IPAMConfig(subnet="nonsense"), IPAMConfig()))
    )
    assert head_of(network).segments == ()

"""``NetworkSettings`` of a container on overlay networks, as an engine shows them."""

import msgspec
import pytest

from skep.api.http.versions import ApiVersion
from skep.engine.api.responses.container_versions import container_known_to
from skep.engine.api.responses.network_settings import network_settings, networks_in_lists
from skep.engine.containers.container import Container, ContainerConfig, ContainerState, PlainOptions
from skep.model.networks.sandbox import Endpoint, EndpointConfig, NetworkMode, Sandbox
from skep.model.networks.tables import NetworkHead
from skep.model.values.ids import ContainerId, NetworkId
from skep.model.values.times import Timestamp


def connected(name: str, *addresses: str, is_ingress: bool = False) -> Endpoint:
    head = NetworkHead(id=NetworkId(f"id-{name}"), name=name, is_ingress=is_ingress)
    place = EndpointConfig(head=head, addresses=addresses, aliases=("front",))
    return Endpoint(config=place, interface="eth0", port="vs1", mac_address="02:42:0a:05:01:03")


ENDPOINT = Sandbox(
    netns="/run/netns/c1",
    address="172.18.0.3",
    prefix_length=16,
    gateway="172.18.0.1",
    mac_address="02:42:ac:12:00:03",
    network="skep-gw",
    endpoints=(
        connected("ingress", "10.0.0.4/24", is_ingress=True),
        connected("web", "10.5.1.3/24", "fd05::3/64"),
        connected("inner", "10.5.2.3/24"),
    ),
)
IDS = {"bridge": "id-bridge", "host": "id-host", "none": "id-none"}
RUNNING = Container(
    id=ContainerId("adff84fa287f" + "0" * 52),
    name="s1.1.x",
    image="i",
    image_id="sha256:i",
    config=ContainerConfig(path="sleep"),
    sandbox=ENDPOINT,
    state=ContainerState.RUNNING,
)


def test_every_network_is_shown_as_an_engine_shows_it() -> None:
    settings = network_settings(RUNNING, IDS)
    assert list(settings["Networks"]) == ["ingress", "web", "inner"]
    inner = settings["Networks"]["inner"]
    assert len(inner.pop("EndpointID")) == 64
    assert inner == {
        "IPAMConfig": {"IPv4Address": "10.5.2.3"},
        "Links": None,
        "Aliases": None,
        "DNSNames": ["s1.1.x", "adff84fa287f"],
        "NetworkID": "id-inner",
        "Gateway": "",
        "IPAddress": "10.5.2.3",
        "IPPrefixLen": 24,
        "IPv6Gateway": "",
        "GlobalIPv6Address": "",
        "GlobalIPv6PrefixLen": 0,
        "MacAddress": "02:42:0a:05:01:03",
        "DriverOpts": None,
        "GwPriority": 0,
    }
    web = settings["Networks"]["web"]
    assert (web["GlobalIPv6Address"], web["GlobalIPv6PrefixLen"]) == ("fd05::3", 64)
    assert [settings[key] for key in ("IPAddress", "Gateway", "MacAddress", "IPPrefixLen")] == ["", "", "", 0]
    assert settings["SandboxKey"] == "/run/netns/c1"


def test_lists_show_the_same_without_names() -> None:
    inner = network_settings(RUNNING, IDS)["Networks"]["inner"]
    assert networks_in_lists(RUNNING, IDS)["inner"] == inner | {"Aliases": None, "DNSNames": None}


def test_1_44_a_network_has_the_names_of_the_container() -> None:
    config = msgspec.structs.replace(RUNNING.config, hostname="host")
    mine = msgspec.structs.replace(RUNNING, plain=PlainOptions(mode=NetworkMode.NETWORKS), config=config)
    web = network_settings(mine, IDS)["Networks"]["web"]
    assert (web["Aliases"], web["DNSNames"]) == (["front"], ["s1.1.x", "front", "adff84fa287f", "host"])


@pytest.mark.parametrize(
    ("version", "aliases"), [("1.44", ["front", "adff84fa287f", "host"]), ("1.45", ["front"])]
)
def test_1_45_the_short_id_is_no_alias(version: str, aliases: list[str]) -> None:
    config = msgspec.structs.replace(RUNNING.config, hostname="host")
    mine = msgspec.structs.replace(RUNNING, plain=PlainOptions(mode=NetworkMode.NETWORKS), config=config)
    shown = {
        "Id": mine.id,
        "Config": {"Hostname": "host", "OnBuild": None},
        "HostConfig": {},
        "NetworkSettings": network_settings(mine, IDS),
    }
    older = container_known_to(ApiVersion(version), shown)
    assert older["NetworkSettings"]["Networks"]["web"]["Aliases"] == aliases
    oldest = container_known_to(ApiVersion("1.43"), shown)["NetworkSettings"]["Networks"]["web"]
    assert (oldest["Aliases"], "DNSNames" in oldest) == (["front", "adff84fa287f", "host"], False)


def test_what_has_ended_keeps_its_networks_and_has_no_address() -> None:
    ended = msgspec.structs.replace(RUNNING, state=ContainerState.EXITED)
    web = network_settings(ended, IDS)["Networks"]["web"]
    assert (web["NetworkID"], web["IPAddress"], web["EndpointID"]) == ("id-web", "", "")


def test_its_name_means_its_addresses_on_all_networks_but_ingress() -> None:
    assert ENDPOINT.own_addresses == ["10.5.1.3", "fd05::3", "10.5.2.3"]
    only = msgspec.structs.replace(ENDPOINT, endpoints=ENDPOINT.endpoints[:1])
    assert only.own_addresses == ["172.18.0.3"]


@pytest.mark.parametrize("mode", [NetworkMode.BRIDGE, NetworkMode.HOST, NetworkMode.NONE])
def test_a_network_that_every_node_has_is_named_by_its_id_from_the_first_start_on(mode: NetworkMode) -> None:
    sandbox = msgspec.structs.replace(ENDPOINT, endpoints=())
    new = msgspec.structs.replace(RUNNING, plain=PlainOptions(mode=mode), sandbox=sandbox)
    started = msgspec.structs.replace(new, started_at=Timestamp("2026-01-02T03:04:05Z"))
    ended = msgspec.structs.replace(started, state=ContainerState.EXITED)
    shown = [network_settings(one, IDS)["Networks"][mode.value] for one in (new, started, ended)]
    assert [one["NetworkID"] for one in shown] == ["", f"id-{mode.value}", f"id-{mode.value}"]
    assert [len(one["EndpointID"]) for one in shown] == [64, 64, 0]
    listed = networks_in_lists(started, IDS)[mode.value]
    assert listed["NetworkID"] == f"id-{mode.value}"

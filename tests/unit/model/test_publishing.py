"""Labels for published ports."""

import re

import pytest

from skep.errors import InvalidArgument
from skep.model.networks.publishing import (
    LABELS_MAX,
    PORTS_MAX,
    PublishOptions,
    check_publishing,
    publish_options,
)
from skep.model.service import EndpointSpec, PortConfig, PublishMode, ServiceSpec

WEB = PortConfig(protocol="tcp", target_port=80, published_port=8080)
DNS = PortConfig(protocol="udp", target_port=53, published_port=53)
DNS_TCP = PortConfig(protocol="tcp", target_port=53, published_port=53)
HOST = PortConfig(protocol="tcp", target_port=22, published_port=22, publish_mode=PublishMode.HOST)


def spec(*ports: PortConfig, **labels: str) -> ServiceSpec:
    return ServiceSpec(labels=labels, endpoint_spec=EndpointSpec(ports=ports))


def options_of(labels: dict[str, str], port: PortConfig) -> PublishOptions:
    ((_, found),) = publish_options(labels, [port])
    return found


def test_without_labels_nothing_is_special() -> None:
    assert options_of({"other": "label"}, WEB) == PublishOptions()


def test_labels_hold_for_all_ports_or_for_one() -> None:
    labels = {
        "skep.publish.host-ip": "127.0.0.1",
        "skep.publish.8080.affinity": "client-ip",
        "skep.publish.8080.proxy-protocol": "v2",
        "skep.publish.53/udp.local": "true",
    }
    assert options_of(labels, WEB) == PublishOptions(host_ip="127.0.0.1", is_sticky=True, proxy_protocol=2)
    assert options_of(labels, DNS) == PublishOptions(host_ip="127.0.0.1", prefers_local=True)
    assert options_of(labels, DNS_TCP) == PublishOptions(host_ip="127.0.0.1")


def test_the_more_exact_label_holds() -> None:
    labels = {
        "skep.publish.53/udp.affinity": "client-ip",
        "skep.publish.53.affinity": "none",
        "skep.publish.affinity": "client-ip",
    }
    assert options_of(labels, WEB).is_sticky
    assert options_of(labels, DNS).is_sticky
    assert not options_of(labels, DNS_TCP).is_sticky


def test_a_port_in_host_mode_has_an_address_only() -> None:
    labels = {
        "skep.publish.host-ip": "::1",
        "skep.publish.affinity": "client-ip",
        "skep.publish.local": "true",
        "skep.publish.proxy-protocol": "v1",
    }
    assert options_of(labels, HOST) == PublishOptions(host_ip="::1")
    assert options_of(labels, DNS).proxy_protocol == 0


@pytest.mark.parametrize(
    ("label", "value", "words"),
    [
        ("skep.publish.8080.host-ip", "localhost", "expected an IP address"),
        ("skep.publish.host-ip", "10.0.0.0/24", "expected an IP address"),
        (
            "skep.publish.8080.host_ip",
            "127.0.0.1",
            "expected one of host-ip, affinity, local, proxy-protocol after",
        ),
        ("skep.publish.", "x", "expected one of host-ip"),
        ("skep.publish.8080.sticky", "true", "expected one of host-ip"),
        ("skep.publish.8080.affinity", "cookie", "expected one of none, client-ip"),
        ("skep.publish.8080.local", "yes", "expected one of false, true"),
        ("skep.publish.8080.proxy-protocol", "v3", "expected one of none, v1, v2"),
        ("skep.publish.web.local", "true", "invalid port 'web'"),
        ("skep.publish.70000.local", "true", "invalid port '70000'"),
        ("skep.publish.0.local", "true", "invalid port '0'"),
        ("skep.publish.53/icmp.local", "true", "invalid port '53/icmp'"),
        ("skep.publish.9090.local", "true", "the service publishes no such port"),
        ("skep.publish.8080/udp.local", "true", "the service publishes no such port"),
        ("skep.publish.22.local", "true", "the port is published in host mode"),
        ("skep.publish.53/udp.proxy-protocol", "v1", "the PROXY protocol is for tcp"),
    ],
)
def test_what_cannot_be_meant_is_refused(label: str, value: str, words: str) -> None:
    with pytest.raises(InvalidArgument, match=words) as refused:
        check_publishing(spec(WEB, DNS, DNS_TCP, HOST, **{label: value}))
    assert f"invalid label {label}" in str(refused.value)


def test_a_label_that_cannot_be_read_counts_as_absent() -> None:
    labels = {"skep.publish.8080.host-ip": "localhost", "skep.publish.local": "true"}
    assert options_of(labels, WEB) == PublishOptions(prefers_local=True)


def test_each_port_has_its_own_options() -> None:
    labels = {"skep.publish.53.local": "true", "skep.publish.53/udp.local": "false"}
    found = {
        (port.published_port, port.protocol): one
        for port, one in publish_options(labels, (DNS, DNS_TCP, WEB))
    }
    assert [found[key].prefers_local for key in ((53, "udp"), (53, "tcp"), (8080, "tcp"))] == [
        False,
        True,
        False,
    ]


def test_ports_and_labels_are_limited_before_any_is_looked_at() -> None:
    ports = [PortConfig(target_port=80, published_port=number) for number in range(1, PORTS_MAX + 2)]
    options = ("host-ip", "affinity", "local", "proxy-protocol")
    labels = {f"skep.publish.{port.published_port}.{option}": "no" for port in ports for option in options}
    with pytest.raises(InvalidArgument, match=f"^a service can publish at most {PORTS_MAX} ports, not 1001$"):
        check_publishing(spec(*ports, **labels))
    with pytest.raises(InvalidArgument, match=f"at most {LABELS_MAX} labels skep.publish.*, not 4004$"):
        check_publishing(spec(*ports[1:], **labels))


def test_as_many_ports_and_labels_as_there_may_be_are_taken() -> None:
    ports = [PortConfig(target_port=80, published_port=number) for number in range(1, PORTS_MAX + 1)]
    values = {"host-ip": "::1", "affinity": "client-ip", "local": "true", "proxy-protocol": "v2"}
    labels = {
        f"skep.publish.{port.published_port}.{option}": value
        for port in ports
        for option, value in values.items()
    }
    assert len(labels) == LABELS_MAX
    check_publishing(spec(*ports, **labels))
    wanted = PublishOptions(host_ip="::1", is_sticky=True, prefers_local=True, proxy_protocol=2)
    assert [one for _, one in publish_options(labels, ports)] == [wanted] * PORTS_MAX


class Counted(dict[str, str]):
    """Labels that count how often all of them are read."""

    readings = 0

    def items(self):
        self.readings += 1
        return super().items()


def test_labels_are_read_once_for_all_ports() -> None:
    labels = Counted({"skep.publish.local": "true"})
    assert [one.prefers_local for _, one in publish_options(labels, (WEB, DNS, DNS_TCP))] == [True] * 3
    assert labels.readings == 1


def test_what_can_be_meant_is_taken() -> None:
    check_publishing(
        spec(
            WEB,
            HOST,
            **{
                "skep.publish.22.host-ip": "127.0.0.1",
                "skep.publish.proxy-protocol": "v1",
                "skep.publish.8080/tcp.local": "true",
                "other": "label",
            },
        )
    )
    check_publishing(ServiceSpec())


@pytest.mark.parametrize("value", ["fe80::1%x", "fd00::1%x }", "224.0.0.1", "ff02::1"])
def test_an_address_that_no_node_has_by_itself_is_refused_and_if_it_is_there_passed_over(value: str) -> None:
    with pytest.raises(
        InvalidArgument, match=re.escape(f"invalid label skep.publish.host-ip={value}: expected an")
    ):
        check_publishing(spec(WEB, **{"skep.publish.host-ip": value}))
    assert options_of({"skep.publish.host-ip": value}, WEB) == PublishOptions()

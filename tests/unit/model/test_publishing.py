"""Labels for published ports."""

import re

import pytest

from skep.errors import InvalidArgument
from skep.model.publishing import PublishOptions, check_publishing, publish_options
from skep.model.service import EndpointSpec, PortConfig, PublishMode, ServiceSpec

WEB = PortConfig(protocol="tcp", target_port=80, published_port=8080)
DNS = PortConfig(protocol="udp", target_port=53, published_port=53)
DNS_TCP = PortConfig(protocol="tcp", target_port=53, published_port=53)
HOST = PortConfig(protocol="tcp", target_port=22, published_port=22, publish_mode=PublishMode.HOST)


def spec(*ports: PortConfig, **labels: str) -> ServiceSpec:
    return ServiceSpec(labels=labels, endpoint_spec=EndpointSpec(ports=ports))


def test_without_labels_nothing_is_special() -> None:
    assert publish_options({"other": "label"}, WEB) == PublishOptions()


def test_labels_hold_for_all_ports_or_for_one() -> None:
    labels = {
        "skep.publish.host-ip": "127.0.0.1",
        "skep.publish.8080.affinity": "client-ip",
        "skep.publish.8080.proxy-protocol": "v2",
        "skep.publish.53/udp.local": "true",
    }
    assert publish_options(labels, WEB) == PublishOptions(
        host_ip="127.0.0.1", is_sticky=True, proxy_protocol=2
    )
    assert publish_options(labels, DNS) == PublishOptions(host_ip="127.0.0.1", prefers_local=True)
    assert publish_options(labels, DNS_TCP) == PublishOptions(host_ip="127.0.0.1")


def test_the_more_exact_label_holds() -> None:
    labels = {
        "skep.publish.53/udp.affinity": "client-ip",
        "skep.publish.53.affinity": "none",
        "skep.publish.affinity": "client-ip",
    }
    assert publish_options(labels, WEB).is_sticky
    assert publish_options(labels, DNS).is_sticky
    assert not publish_options(labels, DNS_TCP).is_sticky


def test_a_port_in_host_mode_has_an_address_only() -> None:
    labels = {
        "skep.publish.host-ip": "::1",
        "skep.publish.affinity": "client-ip",
        "skep.publish.local": "true",
        "skep.publish.proxy-protocol": "v1",
    }
    assert publish_options(labels, HOST) == PublishOptions(host_ip="::1")
    assert publish_options(labels, DNS).proxy_protocol == 0


@pytest.mark.parametrize(
    ("label", "value", "words"),
    [
        ("skep.publish.8080.host-ip", "localhost", "want an IP address"),
        ("skep.publish.host-ip", "10.0.0.0/24", "want an IP address"),
        (
            "skep.publish.8080.host_ip",
            "127.0.0.1",
            "want one of host-ip, affinity, local, proxy-protocol after",
        ),
        ("skep.publish.", "x", "want one of host-ip"),
        ("skep.publish.8080.sticky", "true", "want one of host-ip"),
        ("skep.publish.8080.affinity", "cookie", "want one of none, client-ip"),
        ("skep.publish.8080.local", "yes", "want one of false, true"),
        ("skep.publish.8080.proxy-protocol", "v3", "want one of none, v1, v2"),
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
    assert publish_options(labels, WEB) == PublishOptions(prefers_local=True)


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
        InvalidArgument, match=re.escape(f"invalid label skep.publish.host-ip={value}: want an")
    ):
        check_publishing(spec(WEB, **{"skep.publish.host-ip": value}))
    assert publish_options({"skep.publish.host-ip": value}, WEB) == PublishOptions()

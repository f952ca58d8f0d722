"""Each field of a spec and each label has a class, and only an administrator may give what reaches beyond a stack."""

from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

import msgspec
import pytest

from docs.reference.label_table import LABELS, LabelTarget
from skep.engine.log_drivers import fluentd, gelf, splunk, syslog
from skep.engine.log_drivers.options import COMMON, EVERYWHERE, FILES
from skep.model.door.settings import DOOR_LABELS
from skep.model.network import NetworkSpec
from skep.model.options.labels import FORMER_VOLUMES
from skep.model.permissions.field_rights import (
    CONFIG_LABELS,
    CONTAINER_LABELS,
    FIELDS,
    NETWORK_LABELS,
    SECRET_LABELS,
    SERVICE_LABELS,
    admin_rights,
)
from skep.model.permissions.value_rights import LOG_OPTIONS, is_loopback_registry
from skep.model.secret import ConfigSpec, SecretSpec
from skep.model.service import Limits, ResourceRequirements, ServiceSpec, TaskSpec
from skep.model.values.encoding import ApiObject

SPECS = (ServiceSpec, NetworkSpec, SecretSpec, ConfigSpec)


def parts_of(type_: Any) -> Iterator[type[ApiObject]]:
    """The Structs that a field of a type may hold."""
    if isinstance(type_, type) and issubclass(type_, ApiObject):
        yield type_
    for argument in get_args(type_):
        yield from parts_of(argument)


def types_of(*roots: type[ApiObject]) -> set[type[ApiObject]]:
    found: set[type[ApiObject]] = set()
    waiting = list(roots)
    while waiting:
        one = waiting.pop()
        if one not in found:
            found.add(one)
            waiting += [part for hint in get_type_hints(one).values() for part in parts_of(hint)]
    return found


def test_every_field_of_every_spec_has_a_class():
    assert {type_: set(fields) for type_, fields in FIELDS.items()} == {
        type_: set(type_.__struct_fields__) for type_ in types_of(*SPECS)
    }


@pytest.mark.parametrize(
    ("targets", "classes"),
    [
        ((LabelTarget.SERVICE,), (SERVICE_LABELS,)),
        ((LabelTarget.CONTAINER,), (CONTAINER_LABELS,)),
        ((LabelTarget.NETWORK,), (NETWORK_LABELS,)),
        ((LabelTarget.SECRET, LabelTarget.REVISION), (SECRET_LABELS, CONFIG_LABELS)),
    ],
)
def test_every_label_has_a_class(targets, classes):
    documented = {label.name for label in LABELS if label.target in targets}
    former = {FORMER_VOLUMES}  # on the page of renamed labels
    assert documented == {name for one in classes for name in one} - former


def test_every_log_option_has_a_class():
    drivers = (fluentd, gelf, splunk, syslog)
    known = COMMON | FILES | EVERYWHERE | {name for one in drivers for name in one.KNOWN}
    assert set(LOG_OPTIONS) == known


def test_a_field_and_a_label_without_a_class_are_an_administrators(monkeypatch):
    spec = ServiceSpec(name="web", labels={"skep.of-a-later-version": "1"})
    assert list(admin_rights(spec)) == ["the label skep.of-a-later-version"]
    fields = {name: field for name, field in FIELDS[ServiceSpec].items() if name not in ("name", "labels")}
    monkeypatch.setitem(FIELDS, ServiceSpec, fields)
    assert list(admin_rights(spec)) == ["the field Name", "the field Labels"]


@pytest.mark.parametrize("label", DOOR_LABELS)
def test_only_an_administrator_runs_the_front_door(label: str) -> None:
    assert list(admin_rights(ServiceSpec(name="web", labels={label: "true"}))) == [f"the label {label}"]


def a_service(**container: Any) -> dict[str, Any]:
    return {"Name": "web", "TaskTemplate": {"ContainerSpec": {"Image": "busybox", **container}}}


def limited(memory_bytes: int, **container: Any) -> dict[str, Any]:
    made = a_service(**container)
    made["TaskTemplate"]["Resources"] = {"Limits": {"MemoryBytes": memory_bytes}}
    return made


def ulimit(name: str, hard: int, soft: int = 0) -> dict[str, Any]:
    return {"Ulimits": [{"Name": name, "Hard": hard, "Soft": soft}]}


def tmpfs(*options: list[str]) -> dict[str, Any]:
    return {"Mounts": [{"Type": "tmpfs", "Target": "/t", "TmpfsOptions": {"Options": options}}]}


def volume(**options: Any) -> dict[str, Any]:
    return {"Mounts": [{"Type": "volume", "Source": "v", "Target": "/t", "VolumeOptions": options}]}


SECOND = 1_000_000_000


@pytest.mark.parametrize(
    ("spec", "only_admin"),
    [
        (a_service(), ""),
        # ulimits
        (a_service(**ulimit("rtprio", 0)), ""),
        (a_service(**ulimit("rtprio", 99)), "the ulimit rtprio=0:99"),
        (a_service(**ulimit("rtprio", -1)), "the ulimit rtprio"),
        (a_service(**ulimit("nice", 20, 20)), ""),
        (a_service(**ulimit("nice", 20, 21)), "the ulimit nice"),
        (a_service(**ulimit("nofile", 65536)), ""),
        (a_service(**ulimit("sigpending", 1)), "the ulimit sigpending"),
        (a_service(**ulimit("msgqueue", 1)), "the ulimit msgqueue"),
        (a_service(**ulimit("of-a-later-kernel", 1)), "the ulimit of-a-later-kernel"),
        (a_service(**ulimit("memlock", -1)), "the ulimit memlock"),
        (limited(1 << 30, **ulimit("memlock", -1)), ""),
        # health checks
        (a_service(Healthcheck={"Interval": SECOND, "StartInterval": SECOND, "Timeout": 1}), ""),
        (a_service(Healthcheck={"Interval": SECOND - 1}), "a health check interval below 1 s"),
        (a_service(Healthcheck={"StartInterval": 1_000_000}), "a health check interval below 1 s"),
        # mounts
        (a_service(**tmpfs(["exec"], ["noexec"])), ""),
        (a_service(**tmpfs(["remount"])), "the tmpfs option remount"),
        (a_service(**tmpfs(["exec", "suid"])), "the tmpfs option exec=suid"),
        (a_service(**tmpfs(["exec,suid"])), "the tmpfs option exec,suid"),
        (a_service(**tmpfs([])), "the tmpfs option "),
        (a_service(**volume(NoCopy=True, Subpath="x", Labels={"a": "b"})), ""),
        (a_service(**volume(DriverConfig={"Name": "local"})), ""),
        (a_service(**volume(DriverConfig={"Options": {"o": "bind"}})), "options of the driver"),
        (a_service(**volume(Labels={"skep.x": ""})), "the label skep.x"),
        (a_service(Mounts=[{"Type": "bind", "Source": "/", "Target": "/x"}]), "a bind mount of /"),
        (a_service(Mounts=[{"Source": "/", "Target": "/x"}]), "a  mount of /"),
        (
            a_service(Mounts=[{"Type": "volume", "Target": "/x", "BindOptions": {"Propagation": "shared"}}]),
            "the field BindOptions",
        ),
        # images and name servers
        (a_service(Image="localhost:5000/x"), "an image of a registry on the machine itself"),
        (a_service(DNSConfig={"Nameservers": ["10.0.0.2", "2001:db8::1"]}), ""),
        (a_service(DNSConfig={"Nameservers": ["127.0.0.53"]}), "a name server on the machine itself"),
        (a_service(DNSConfig={"Nameservers": ["fe80::1%eth0"]}), "a name server on the machine itself"),
        # the rest of what a container has
        (a_service(CapabilityDrop=["ALL"], Sysctls={"net.core.somaxconn": "1"}, OomScoreAdj=5), ""),
        (a_service(CapabilityAdd=["SYS_TIME"]), "the capabilities SYS_TIME"),
        (a_service(OomScoreAdj=-1), "a lower score"),
        (a_service(Privileges={"NoNewPrivileges": True, "Seccomp": {"Mode": "default"}}), ""),
        (a_service(Privileges={"Seccomp": {"Mode": "unconfined"}}), "security options"),
        (a_service(Privileges={"SELinuxContext": {"Disable": True}}), "security options"),
        (a_service(Labels={"skep.exec": "none", "skep.api": "read", "traefik.enable": "true"}), ""),
        (a_service(Labels={"skep.gpus": "all"}), "rights over its machine (gpus)"),
        (a_service(Labels={"skep.gpus": "x y"}), "labels that cannot be read"),
        (a_service(Labels={"skep.priority": "1"}), "the label skep.priority"),
        # services
        ({**a_service(), "Labels": {"skep.publish.80/tcp.affinity": "client-ip", "skep.priority": "5"}}, ""),
        ({**a_service(), "Labels": {"skep.publish.80.x": "1"}}, "the label skep.publish.80.x"),
        ({**a_service(), "Networks": [{"Target": "host"}]}, "the machine's network host"),
        ({**a_service(), "Networks": [{"Target": "n", "DriverOpts": {"a": "b"}}]}, "the field DriverOpts"),
        ({"TaskTemplate": {"PluginSpec": {}}}, "a task that is no container"),
        ({"TaskTemplate": {"LogDriver": {"Name": "local", "Options": {"max-size": "1m"}}}}, ""),
        (
            {"TaskTemplate": {"LogDriver": {"Options": {"syslog-tls-key": "/k"}}}},
            "a file of its machine (log option syslog-tls-key)",
        ),
        (
            {"TaskTemplate": {"LogDriver": {"Options": {"of-a-later-driver": "1"}}}},
            "the log option of-a-later-driver",
        ),
    ],
)
def test_what_only_an_administrator_may_give_a_service(spec, only_admin):
    found = next(admin_rights(msgspec.convert(spec, ServiceSpec)), "")
    assert found.startswith(only_admin) if only_admin else not found, found


def a_network(driver: dict[str, Any] | None = None, subnet: str = "", **spec: Any) -> dict[str, Any]:
    ipam = {"Driver": {"Name": "default"}, "Configs": [{"Subnet": subnet}] if subnet else []}
    return {
        "Name": "n",
        "DriverConfiguration": {"Name": "overlay", **(driver or {})},
        "IPAMOptions": ipam,
        **spec,
    }


@pytest.mark.parametrize(
    ("spec", "only_admin"),
    [
        (a_network(subnet="10.1.0.0/16"), ""),
        (a_network(subnet="10.0.0.0/8"), "a subnet wider than /16"),
        (a_network(subnet="10.0.0.1/15"), "a subnet wider than /16"),
        (a_network(subnet="fd00::/48"), ""),
        (a_network(subnet="fd00::/47"), "a subnet wider than /48"),
        (a_network(Labels={"skep.attach": "node.role==manager", "skep.data-plane": "skep"}), ""),
        (a_network(Labels={"skep.allow-overlap": "true"}), "the label skep.allow-overlap"),
        (a_network({"Options": {"skep.allow-overlap": "true"}}), "the network option skep.allow-overlap"),
        (a_network({"Options": {"encrypted": "", "com.docker.network.driver.mtu": "1400"}}), ""),
        (
            a_network({"Options": {"com.docker.network.driver.overlay.vxlanid_list": "5"}}),
            "the network option com.docker.network.driver.overlay.vxlanid_list",
        ),
        (a_network({"Name": "macvlan"}), "a network that is no overlay"),
        (a_network(Ingress=True), "a network that is no overlay, or the ingress network"),
        (a_network(ConfigFrom={"Network": "x"}), "the field ConfigFrom"),
        (a_network(Attachable=True, Internal=True), ""),
    ],
)
def test_what_only_an_administrator_may_give_a_network(spec, only_admin):
    found = next(admin_rights(msgspec.convert(spec, NetworkSpec)), "")
    assert found.startswith(only_admin) if only_admin else not found, found


@pytest.mark.parametrize(
    ("image", "is_local"),
    [
        *((image, False) for image in ("busybox", "localhost", "x/y", "registry:5000/x", "127x.com/y")),
        *((image, False) for image in ("10.0.0.1:5000/x", "[2001:db8::1]:5000/x", "localhost.example.com/x")),
        *(
            (image, True)
            for image in ("localhost/x", "localhost:5000/x:1", "LOCALHOST:1/x", "a.localhost:1/x")
        ),
        *((image, True) for image in ("localhost.:5000/x", "127.0.0.1:5000/x", "127.1:80/x", "0:80/x")),
        *(
            (image, True)
            for image in ("0x7f000001:80/x", "2130706433:80/x", "0177.0.0.1:80/x", "[::1]:5000/x")
        ),
        *(
            (image, True)
            for image in ("[::ffff:127.0.0.1]:1/x", "0.0.0.0:1/x", "[::]:1/x", "169.254.169.254/x")
        ),
    ],
)
def test_a_registry_on_the_machine_itself(image, is_local):
    assert is_loopback_registry(image) is is_local


@pytest.mark.parametrize("name", ["skep.volume-affinity", "skep.volumes"])
def test_operators_keep_services_with_the_former_name_of_a_label(name):
    assert list(admin_rights(ServiceSpec(name="db", labels={name: "keep"}))) == []


@pytest.mark.parametrize(
    ("fields", "reasons"),
    [
        ({"swap_bytes": 1}, ["the field SwapBytes"]),
        ({"swap_bytes": -1}, ["the field SwapBytes"]),
        ({"memory_swappiness": 7}, ["the field MemorySwappiness"]),
        ({"swap_bytes": 0, "memory_swappiness": 0}, []),  # no swap at all
    ],
)
def test_1_52_swap_of_a_service_needs_an_administrator(fields: dict[str, int], reasons: list[str]) -> None:
    resources = ResourceRequirements(limits=Limits(memory_bytes=64 << 20), **fields)
    spec = ServiceSpec(name="db", task_template=TaskSpec(resources=resources))
    assert list(admin_rights(spec)) == reasons

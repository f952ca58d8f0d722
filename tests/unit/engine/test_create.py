"""From create requests to containers: what the image adds, what is parsed, and what is refused by name."""

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skep.api.formats.gosyntax import parse_size
from skep.engine.containers.container import ContainerConfig, RestartPolicy
from skep.engine.containers.create import (
    NodeDefaults,
    container_config,
    invocation,
    labels,
    mounts,
    plain_options,
)
from skep.engine.containers.request import CreateRequest, TaskOptions, read_create
from skep.engine.images.image import ContainerDefaults
from skep.engine.log_drivers.options import log_config
from skep.errors import FailedPrecondition, InvalidArgument, SkepError, Unimplemented
from skep.model.networks.sandbox import EndpointRequest, NetworkMode
from skep.model.values.meta import Driver
from skep.model.values.times import SECOND_NS

IMAGE = ContainerDefaults(cmd=("sh",), env=("A=1", "B=2"), exposed_ports={"80/tcp": {}})


def body(
    host: dict[str, Any] | None = None, endpoints: dict[str, Any] | None = None, **config: Any
) -> CreateRequest:
    value = {"Image": "busybox", **config, "HostConfig": host or {}}
    value["NetworkingConfig"] = {"EndpointsConfig": endpoints or {}}
    return read_create(json.dumps(value).encode())


def configured(image: ContainerDefaults = IMAGE, **words: Any) -> ContainerConfig:
    node = NodeDefaults(hostname="node", host_gateway="172.18.0.1", log=Driver(name="json-file"))
    return container_config(body(**words), image, None, node)


def everything(host: dict[str, Any]) -> None:
    request = body(host)
    plain_options(request)
    mounts(request)
    configured(host=host)


def test_values_that_the_docker_command_always_sends_are_accepted() -> None:
    host = {
        "Binds": None,
        "NetworkMode": "default",
        "MemorySwappiness": -1,
        "CgroupnsMode": "",
        "Privileged": False,
        "BlkioDeviceReadBps": [],
        "ConsoleSize": [24, 80],
        "MaskedPaths": None,
        "RestartPolicy": {"Name": "no", "MaximumRetryCount": 0},
        "Memory": 64 << 20,
        "MemorySwap": 128 << 20,
    }
    request = body(host, Domainname="", OnBuild=None)
    assert plain_options(request).mode is NetworkMode.BRIDGE
    assert request.host_config.memory == 64 << 20


@pytest.mark.parametrize(
    ("host", "option"),
    [
        ({"KernelMemory": 1 << 20}, "--kernel-memory"),
        ({"SomethingOfTomorrow": "on"}, "somethingoftomorrow"),
        ({"SecurityOpt": ["writable-cgroups"]}, "--security-opt writable-cgroups"),
        ({"SecurityOpt": ["writable-cgroups=1"]}, "--security-opt writable-cgroups"),
    ],
)
def test_an_option_that_is_not_honored_is_refused_by_its_name(host: dict[str, Any], option: str) -> None:
    with pytest.raises(Unimplemented, match=option):
        everything(host)


def test_options_of_a_network_that_are_not_honored_are_refused_too() -> None:
    with pytest.raises(Unimplemented, match="--link-local-ip"):
        body(endpoints={"net1": {"IPAMConfig": {"LinkLocalIPs": ["169.254.1.1"]}}})
    for links in ({"Links": ["a:b"]}, {"Links": ["a:b"], "NetworkMode": "none"}):
        with pytest.raises(Unimplemented, match="--link"):
            plain_options(body(links))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"IPv4Address": "fd00::1"}, "^invalid IPv4 address: fd00::1$"),
        ({"IPv4Address": "10.0.0.256"}, "^invalid IPv4 address: 10.0.0.256$"),
        ({"IPv6Address": "10.0.0.1"}, "^invalid IPv6 address: 10.0.0.1$"),
        ({"IPv6Address": "::ffff:10.0.0.1"}, "^invalid IPv6 address: ::ffff:10.0.0.1$"),
        ({"IPv6Address": "fe80::1%eth0"}, "^invalid IPv6 address: fe80::1%eth0$"),
    ],
)
def test_an_address_of_the_other_version_is_none(given: dict[str, str], said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        plain_options(body({"NetworkMode": "net1"}, endpoints={"net1": {"IPAMConfig": given}}))


def test_addresses_are_of_a_users_networks_only() -> None:
    both = {"IPAMConfig": {"IPv4Address": "10.0.0.1", "IPv6Address": "FD00:0::1"}}
    (request,) = plain_options(body({"NetworkMode": "net1"}, endpoints={"net1": both})).networks
    assert (request.address, request.address6) == ("10.0.0.1", "fd00::1")
    for mode, network in (("default", "default"), ("bridge", "bridge"), ("none", "none")):
        for version in ("IPv4Address", "IPv6Address"):
            endpoint = {"IPAMConfig": {version: both["IPAMConfig"][version]}}
            with pytest.raises(
                InvalidArgument, match="user specified IP address is supported on user defined"
            ):
                plain_options(body({"NetworkMode": mode}, endpoints={network: endpoint}))


@pytest.mark.parametrize(
    ("host", "said"),
    [
        ({"RestartPolicy": {"Name": "often"}}, "invalid restart policy 'often'"),
        (
            {"RestartPolicy": {"Name": "always", "MaximumRetryCount": 2}},
            "maximum retry count cannot be used with restart policy 'always'",
        ),
        ({"RestartPolicy": {"Name": "always"}, "AutoRemove": True}, "can't create 'AutoRemove' container"),
        ({"PortBindings": {"80/tcp": [{"HostPort": "99999"}]}}, 'invalid port specification: "99999"'),
        ({"Binds": ["/a:/b:bogus"]}, "invalid mode: bogus"),
        ({"Binds": ["/a:/b", "/c:/b"]}, "Duplicate mount point: /b"),
        ({"ExtraHosts": ["x"]}, "bad format for add-host"),
        ({"SecurityOpt": ["seccomp"]}, '^invalid --security-opt 1: "seccomp"$'),
        ({"SecurityOpt": ["no-new-privileges=yes"]}, '^invalid --security-opt 2: "no-new-privileges=yes"$'),
        ({"SecurityOpt": ["no-new-privileges="]}, '^invalid --security-opt 2: "no-new-privileges="$'),
        ({"SecurityOpt": ["selinux=off"]}, '^invalid --security-opt 2: "selinux=off"$'),
        ({"Devices": [{"PathOnHost": "/dev/nu\0ll"}]}, "it contains a zero byte"),
        ({"Devices": [{"PathOnHost": "/dev/null", "PathInContainer": "/\0"}]}, "it contains a zero byte"),
        ({"BlkioDeviceReadBps": [{"Path": "/dev/\0", "Rate": 1}]}, "it contains a zero byte"),
        ({"BlkioWeightDevice": [{"Path": "/dev/\0", "Weight": 10}]}, "it contains a zero byte"),
        ({"Memory": -1}, "invalid memory"),
        ({"Memory": 1024}, "^Minimum memory limit allowed is 6MB$"),
        ({"MemoryReservation": 1024}, "^Minimum memory reservation allowed is 6MB$"),
        (
            {"Mounts": [{"Type": "bind", "Target": "/x"}]},
            '^invalid mount config for type "bind": field Source must not be empty$',
        ),
        (
            {"Mounts": [{"Type": "bind", "Source": "../..", "Target": "/x"}]},
            "^invalid mount config for type \"bind\": invalid mount path: '../..' mount path must be absolute$",
        ),
        (
            {"Mounts": [{"Type": "volume", "Source": "data", "Target": "x"}]},
            "^invalid mount config for type \"volume\": invalid mount path: 'x' mount path must be absolute$",
        ),
        (
            {"Mounts": [{"Type": "bind", "Source": "/etc", "Target": "/x/../.."}]},
            "^invalid mount config for type \"bind\": invalid specification: destination can't be '/'$",
        ),
        (
            {"Mounts": [{"Type": "volume", "Source": "data"}]},
            '^invalid mount config for type "volume": field Target must not be empty$',
        ),
        (
            {"Mounts": [{"Type": "tmpfs", "Source": "/etc", "Target": "/x"}]},
            '^invalid mount config for type "tmpfs": field Source must not be specified$',
        ),
        (
            {"Binds": ["/etc:/:ro"]},
            "^invalid volume specification: '/etc:/:ro': invalid mount config .*: destination can't be '/'$",
        ),
        ({"Tmpfs": {"/": ""}}, "destination can't be '/'"),
    ],
)
def test_what_can_never_work_is_refused(host: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        everything(host)


MAC, OTHER_MAC = "02:00:00:00:00:1a", "02:00:00:00:00:02"


def test_a_mac_address_is_that_of_the_first_network() -> None:
    assert plain_options(read_create(json.dumps({"MacAddress": MAC.upper()}).encode())).mac_address == MAC
    own = {"MacAddress": MAC, "HostConfig": {"NetworkMode": "net1"}}
    plain = plain_options(read_create(json.dumps(own).encode()))
    assert (plain.mac_address, plain.networks[0].mac_address) == ("", MAC)
    both = {"net2": {"MacAddress": OTHER_MAC}, "net1": {"MacAddress": MAC}}
    plain = plain_options(body({"NetworkMode": "net1"}, both))
    assert [(one.network, one.mac_address) for one in plain.networks] == [("net1", MAC), ("net2", OTHER_MAC)]
    for name in ("bridge", "default"):
        plain = plain_options(body({}, {name: {"MacAddress": MAC}}))
        assert (plain.mac_address, plain.networks) == (MAC, ())


@pytest.mark.parametrize(
    ("host", "mac_address", "said"),
    [
        ({}, "bogus", "address bogus: invalid MAC address"),
        ({}, "02:00:00:00:00:1", "invalid MAC address"),
        ({"NetworkMode": "net1"}, "03:00:00:00:00:01", "a container needs a unicast address"),
        ({}, "00:00:00:00:00:00", "a container needs a unicast address"),
        ({"NetworkMode": "host"}, MAC, "conflicting options: mac-address and the network mode"),
        ({"NetworkMode": "none"}, MAC, "conflicting options: mac-address and the network mode"),
        ({"NetworkMode": "container:x"}, MAC, "conflicting options: mac-address and the network mode"),
        ({"NetworkMode": "net1", "_": OTHER_MAC}, MAC, "must match the endpoint-specific MAC address"),
    ],
)
def test_a_mac_address_that_cannot_be_is_refused(host: dict[str, Any], mac_address: str, said: str) -> None:
    host = dict(host)
    endpoints = {"net1": {"MacAddress": other}} if (other := host.pop("_", "")) else {}
    whole = {
        "MacAddress": mac_address,
        "HostConfig": host,
        "NetworkingConfig": {"EndpointsConfig": endpoints},
    }
    with pytest.raises(InvalidArgument, match=said):
        plain_options(read_create(json.dumps(whole).encode()))


@pytest.mark.parametrize(
    ("mode", "said"),
    [
        ("container:x", "conflicting options: container type network can't be used with links"),
        ("host", "conflicting options: host type networking can't be used with links"),
    ],
)
def test_links_need_a_network_of_the_containers_own(mode: str, said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        plain_options(body({"NetworkMode": mode, "Links": ["a:b"]}))


@pytest.mark.parametrize("mode", ["", "default", "bridge", "none"])
def test_links_on_a_network_without_names_are_refused_by_name(mode: str) -> None:
    said = "--link on a network that containers have no names on"
    with pytest.raises(Unimplemented, match=said):
        plain_options(body({"NetworkMode": mode, "Links": ["a:b"]}))
    with pytest.raises(Unimplemented, match=said):
        plain_options(body({"NetworkMode": mode}, {mode or "bridge": {"Links": ["a:b"]}}))


def test_a_host_gateway_that_the_node_does_not_have_is_refused_in_dockers_words() -> None:
    node = NodeDefaults(hostname="node", host_gateway="", log=Driver(name="json-file"))
    with pytest.raises(FailedPrecondition, match="unable to derive the IP value for host-gateway"):
        container_config(body({"ExtraHosts": ["gate:host-gateway"]}), IMAGE, None, node)


def test_the_host_gateway_is_the_nodes_address_for_plain_containers_and_for_tasks() -> None:
    plain = configured(host={"ExtraHosts": ["gate:host-gateway", "six:fd00::1", "host-gateway:10.0.0.1"]})
    assert plain.hosts == ("172.18.0.1 gate", "fd00::1 six", "10.0.0.1 host-gateway")
    node = NodeDefaults(hostname="node", host_gateway="172.18.0.1", log=Driver(name="json-file"))
    task = TaskOptions(hosts=("host-gateway gate host.docker.internal", "10.0.0.2 db"), stop_grace_ns=0)
    made = container_config(body(), IMAGE, task, node)
    assert made.hosts == ("172.18.0.1 gate host.docker.internal", "10.0.0.2 db")
    with pytest.raises(FailedPrecondition, match="unable to derive the IP value for host-gateway"):
        container_config(body(), IMAGE, task, node._replace(host_gateway=""))


def test_links_of_a_request_belong_to_its_first_network() -> None:
    plain = plain_options(
        body(
            {"NetworkMode": "net1", "Links": ["db:store", "db"]},
            {"net1": {"Links": ["db", "x:y"]}, "net2": {}},
        )
    )
    assert [one.links for one in plain.networks] == [("db", "x:y", "db:store"), ()]
    with pytest.raises(InvalidArgument, match="bad format for links: a:b:c"):
        plain_options(body({"NetworkMode": "net1", "Links": ["a:b:c"]}))


def test_networks_come_with_their_aliases_and_addresses() -> None:
    plain = plain_options(
        body(
            {"NetworkMode": "net1"}, {"net1": {"Aliases": ["db"], "IPAMConfig": {"IPv4Address": "10.0.9.9"}}}
        )
    )
    assert plain.mode is NetworkMode.NETWORKS
    assert plain.networks == (EndpointRequest(network="net1", aliases=("db",), address="10.0.9.9"),)
    with pytest.raises(InvalidArgument, match="only for containers in user defined networks"):
        plain_options(body({}, {"bridge": {"Aliases": ["db"]}}))
    assert plain_options(body({"NetworkMode": "host"})).mode is NetworkMode.HOST


def test_ports_lead_from_the_node_into_the_container() -> None:
    host = {"PortBindings": {"80/tcp": [{"HostIp": "127.0.0.1", "HostPort": "8080"}], "53/udp": [{}]}}
    ports = configured(host=host).ports
    assert [(one.protocol, one.target_port, one.published_port, one.host_ip) for one in ports] == [
        ("udp", 53, 0, ""),
        ("tcp", 80, 8080, "127.0.0.1"),
    ]
    everything = configured(host={"PublishAllPorts": True}).ports
    assert [(one.target_port, one.published_port) for one in everything] == [(80, 0)]
    assert configured(host={"NetworkMode": "host", **host}).ports == ()


def test_entrypoint_and_command_replace_the_images_as_in_docker() -> None:
    image = ContainerDefaults(entrypoint=("/init",), cmd=("serve",))
    asked = [
        ({}, ("/init", "serve")),
        ({"Cmd": ["x"]}, ("/init", "x")),
        ({"Entrypoint": ["/e"]}, ("/e",)),
        ({"Entrypoint": [""], "Cmd": ["x"]}, ("x",)),
    ]
    for words, wanted in asked:
        config = configured(image, **words)
        assert (config.path, *config.args) == wanted
    with pytest.raises(SkepError, match="No command specified"):
        configured(image, Entrypoint=[""])


def test_security_and_the_other_options() -> None:
    config = configured(
        host={
            "SecurityOpt": ["no-new-privileges", "seccomp=unconfined"],
            "CapAdd": ["NET_ADMIN"],
            "ExtraHosts": ["gate:host-gateway", "db:10.1.1.1"],
            "CpuQuota": 50_000,
        },
        Env=["B=3"],
    )
    assert (config.no_new_privileges, config.seccomp, config.capability_add) == (
        True,
        "unconfined",
        ("NET_ADMIN",),
    )
    assert config.hosts == ("172.18.0.1 gate", "10.1.1.1 db")
    assert (config.nano_cpus, config.env) == (500_000_000, ("B=3", "A=1"))
    ordered = ["Z=1", "B=3", "Z=2", "GONE", "C=4"]
    assert configured(Env=ordered).env == (*ordered, "A=1"), "as given, then what the image has beside it"
    assert plain_options(
        body({"RestartPolicy": {"Name": "on-failure", "MaximumRetryCount": 3}})
    ).restart == RestartPolicy(name="on-failure", attempts_max=3)


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ([], ("default", "default", False)),
        (["seccomp=unconfined", "apparmor=unconfined"], ("unconfined", "unconfined", False)),
        (["seccomp:unconfined", "apparmor:mine"], ("unconfined", "mine", False)),
        (["seccomp=builtin", "apparmor=docker-default"], ("default", "default", False)),
        (["seccomp=", "apparmor="], ("default", "default", False)),
        (['seccomp={"defaultAction": "a=b:c"}'], ('{"defaultAction": "a=b:c"}', "default", False)),
        (["no-new-privileges"], ("default", "default", True)),
        (["no-new-privileges:true"], ("default", "default", True)),
        (["no-new-privileges", "no-new-privileges=0"], ("default", "default", False)),
        (
            ["label=disable", "label:disable", "disable", "writable-cgroups=false"],
            ("default", "default", False),
        ),
    ],
)
def test_security_options_are_read_as_docker_reads_them(
    options: list[str], found: tuple[str, str, bool]
) -> None:
    config = configured(host={"SecurityOpt": options})
    assert (config.seccomp, config.apparmor, config.no_new_privileges) == found
    assert plain_options(body({"SecurityOpt": options})).security_options == tuple(options)


def test_selinux_options_are_kept_and_their_modes_exclude_each_other() -> None:
    given = ["label=level:s0:c100", "label:type:svirt_apache_t", "disable", "label=anything"]
    config = configured(host={"SecurityOpt": given})
    assert config.label_options == ("level:s0:c100", "type:svirt_apache_t", "disable", "anything")
    with pytest.raises(InvalidArgument, match=r"^invalid mode: z,Z$"):
        mounts(body({"Binds": ["/a:/b:z,Z"]}))


def test_no_plain_container_has_the_labels_of_a_task() -> None:
    with pytest.raises(InvalidArgument, match="for containers of tasks"):
        labels(body(Labels={"com.docker.swarm.task.id": "t1"}), IMAGE, None)
    image = ContainerDefaults(labels={"com.docker.swarm.task.id": "t1", "a": "b"})
    assert labels(body(), image, None) == {"a": "b"}


@pytest.mark.parametrize(
    ("text", "size"),
    [("10m", 10 << 20), ("1.5GiB", 3 << 29), ("4096", 4096), ("1kb", 1024), ("2 T", 2 << 40), ("7B", 7)],
)
def test_sizes_are_read_as_docker_does(text: str, size: int) -> None:
    assert parse_size(text) == size


@given(st.text(max_size=10))
def test_any_word_is_a_size_or_an_invalid_argument(text: str) -> None:
    with suppress(InvalidArgument):
        assert parse_size(text) >= 0


WITH_ENTRYPOINT = ContainerDefaults(entrypoint=("/entry",), cmd=("serve",))


@pytest.mark.parametrize(
    ("command", "args", "expected"),
    [
        ((), (), (("/entry",), ("serve",))),
        ((), ("x",), (("/entry",), ("x",))),
        (("run",), (), (("run",), ())),
        (("run",), ("x",), (("run",), ("x",))),
    ],
)
def test_command_and_arguments_stand_over_the_images(
    command: tuple[str, ...], args: tuple[str, ...], expected: tuple[tuple[str, ...], tuple[str, ...]]
) -> None:
    assert invocation(CreateRequest(entrypoint=command or None, cmd=args), WITH_ENTRYPOINT) == expected


def test_log_options_become_bounds() -> None:
    config = log_config(Driver(name="", options={"max-size": "10k", "max-file": "3"}), {})
    assert (config.type, config.max_size_bytes, config.max_files) == ("json-file", 10240, 3)
    assert log_config(Driver(name="local", options={"max-size": "-1"}), {}).max_size_bytes == 0


@pytest.mark.parametrize("name", ["", "INT", "SIGTERM", "15", "RTMIN+3"])
def test_a_stop_signal_is_taken_by_any_of_its_names(name: str) -> None:
    assert configured(StopSignal=name).stop_signal == name


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        *(
            ({name: duration}, f"{name} in Healthcheck cannot be less than 1ms")
            for name in ("Interval", "Timeout", "StartPeriod", "StartInterval")
            for duration in (1, -1, 999_999)
        ),
        ({"Retries": -5}, "Retries in Healthcheck cannot be negative"),
    ],
)
def test_a_health_check_that_would_never_pause_is_refused(fields: dict[str, int], said: str) -> None:
    with pytest.raises(InvalidArgument, match=f"^{said}$"):
        plain_options(body(Healthcheck={"Test": ["CMD", "true"], **fields}))


def test_a_health_check_may_leave_its_times_to_the_engine_or_have_the_shortest() -> None:
    for duration in (0, 1_000_000):
        plain_options(body(Healthcheck={"Test": ["CMD", "true"], "Interval": duration, "Timeout": duration}))


@pytest.mark.parametrize(
    ("given", "of_image", "shown", "grace_s"),
    [
        (None, None, None, 10),
        (3, None, 3, 3),
        (None, 7, 7, 7),
        (0, 7, 0, 0),
        (-1, None, -1, -1),
        (-60, 7, -60, -1),
    ],
)
def test_the_time_for_a_stop_is_the_users_else_the_images_and_may_have_no_bound(
    given: int | None, of_image: int | None, shown: int | None, grace_s: int
) -> None:
    config = configured(ContainerDefaults(cmd=("sh",), stop_timeout=of_image), StopTimeout=given)
    assert (config.stop_timeout, config.stop_grace_ns) == (shown, grace_s * SECOND_NS)


def test_a_container_that_could_never_be_stopped_is_refused() -> None:
    """A task that ran with such a signal was in the way of its service's removal for good."""
    with pytest.raises(InvalidArgument, match=r"^Invalid signal: NOSUCH$"):
        configured(StopSignal="NOSUCH")

"""Rights over their machine that services ask for by labels of their containers."""

import pytest

from skep.errors import InvalidArgument
from skep.model.container import ContainerSpec
from skep.model.options.labels import check_swarm_labels
from skep.model.permissions.rights import (
    ALL_RIGHTS,
    CDI_LABEL,
    DEVICES_LABEL,
    ApiAccess,
    Device,
    Gpus,
    MachineRights,
    Right,
    allowed_by,
    allowed_rights,
    api_access,
    check_service_rights,
    is_listed,
    missing_devices,
    reported_rights,
    rights_of,
    rights_text,
)


def rights(**labels: str) -> MachineRights:
    named = {f"skep.{name.replace('_', '-')}": value for name, value in labels.items()}
    return rights_of(ContainerSpec(image="i", labels={"other": "label", **named}))


def test_a_service_without_labels_asks_for_nothing() -> None:
    assert rights().kinds == frozenset()
    assert rights_of(None) == MachineRights()
    assert rights(privileged="false").kinds == frozenset()


@pytest.mark.parametrize(
    ("name", "value", "expected", "kind"),
    [
        ("privileged", "true", MachineRights(privileged=True), Right.PRIVILEGED),
        (
            "devices",
            "/dev/a, /dev/b:/dev/c,/dev/d:r,/dev/e:/dev/f:rw,acme.com/net=eth9",
            MachineRights(
                devices=(
                    Device("/dev/a", "/dev/a", "rwm"),
                    Device("/dev/b", "/dev/c", "rwm"),
                    Device("/dev/d", "/dev/d", "r"),
                    Device("/dev/e", "/dev/f", "rw"),
                ),
                cdi_devices=("acme.com/net=eth9",),
            ),
            Right.DEVICES,
        ),
        (
            "device_rules",
            "c 188:* rwm,b 8:0 r",
            MachineRights(device_rules=("c 188:* rwm", "b 8:0 r")),
            Right.DEVICES,
        ),
        ("gpus", "all", MachineRights(gpus=Gpus(count=-1)), Right.GPUS),
        ("gpus", "reserved", MachineRights(gpus=Gpus(is_reserved=True)), Right.GPUS),
        (
            "devices",
            "reserved,acme.com/net=eth9",
            MachineRights(cdi_devices=("acme.com/net=eth9",), has_reserved_devices=True),
            Right.DEVICES,
        ),
        ("gpus", "2", MachineRights(gpus=Gpus(count=2)), Right.GPUS),
        ("gpus", "device=0,GPU-ab", MachineRights(gpus=Gpus(ids=("0", "GPU-ab"))), Right.GPUS),
        ("api", "full", MachineRights(api_full=True), Right.API),
        ("api", "inspect", MachineRights(api_inspect=True), Right.API_INSPECT),
        ("executor", "process", MachineRights(is_process=True), Right.PROCESSES),
        ("pid", "host", MachineRights(pid="host"), Right.NAMESPACES),
        ("ipc", "host", MachineRights(ipc="host"), Right.NAMESPACES),
        ("uts", "host", MachineRights(uts="host"), Right.NAMESPACES),
        ("shm_size", "256m", MachineRights(shm_bytes=256 << 20), Right.RESOURCES),
        ("shm_size", "1GB", MachineRights(shm_bytes=1 << 30), Right.RESOURCES),
        ("cpu_shares", "512", MachineRights(cpu_shares=512), Right.RESOURCES),
        ("cpuset_cpus", "0-1,3", MachineRights(cpuset_cpus="0-1,3"), Right.RESOURCES),
        ("cpuset_mems", "0", MachineRights(cpuset_mems="0"), Right.RESOURCES),
        ("memory_swap", "-1", MachineRights(memory_swap=-1), Right.RESOURCES),
        ("memory_swappiness", "0", MachineRights(memory_swappiness=0), Right.RESOURCES),
        ("blkio_weight", "10", MachineRights(blkio_weight=10), Right.RESOURCES),
        (
            "device_read_bps",
            "/dev/sda:1m,/dev/sdb:7",
            MachineRights(read_bps=(("/dev/sda", 1 << 20), ("/dev/sdb", 7))),
            Right.RESOURCES,
        ),
        ("device_write_bps", "/dev/sda:1", MachineRights(write_bps=(("/dev/sda", 1),)), Right.RESOURCES),
        ("device_read_iops", "/dev/sda:1", MachineRights(read_iops=(("/dev/sda", 1),)), Right.RESOURCES),
        ("device_write_iops", "/dev/sda:1", MachineRights(write_iops=(("/dev/sda", 1),)), Right.RESOURCES),
    ],
)
def test_a_label_asks_for_a_right(name: str, value: str, expected: MachineRights, kind: Right) -> None:
    found = rights(**{name: value})
    assert found == expected
    assert found.kinds == {kind}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("privileged", "yes"),
        ("devices", ""),
        ("devices", "ttyUSB0"),
        ("devices", "/dev/a:/dev/b:x"),
        ("devices", "/dev/a:/dev/b:r:w"),
        ("device_rules", "c 1 r"),
        ("gpus", "0"),
        ("gpus", "device="),
        ("gpus", "some"),
        ("pid", "container:x"),
        ("api", "write"),
        ("shm_size", "-1"),
        ("shm_size", "0"),
        ("shm_size", "9999999999999t"),
        ("cpu_shares", "1"),
        ("cpuset_cpus", "x"),
        ("memory_swap", "-2"),
        ("memory_swappiness", "101"),
        ("memory_swappiness", "٣"),
        ("blkio_weight", "9"),
        ("device_read_bps", "/dev/sda"),
        ("device_read_iops", "/dev/sda:1m"),
        ("device_write_bps", "/dev/sda:99999999t"),
        ("devices", ",".join(["/dev/a"] * 257)),
    ],
)
def test_a_label_that_cannot_be_read_is_refused_with_its_name(name: str, value: str) -> None:
    with pytest.raises(InvalidArgument, match=f"invalid label skep.{name.replace('_', '-')}={value}: "):
        rights(**{name: value})


def test_a_right_is_the_containers_not_the_services() -> None:
    check_service_rights(ContainerSpec(image="i", labels={"skep.pid": "host"}), {"skep.drain": "1s"})
    with pytest.raises(InvalidArgument, match=r"the label skep\.pid works on containers only"):
        check_service_rights(ContainerSpec(image="i"), {"skep.pid": "host"})


def test_reading_the_api_needs_no_right() -> None:
    assert rights(api="read") == MachineRights()
    assert api_access({}) is api_access({"skep.api": "read"}) is ApiAccess.READ
    assert api_access({"skep.api": "full"}) is ApiAccess.FULL
    with pytest.raises(InvalidArgument, match=r"invalid label skep\.api=all: expected read, inspect or full"):
        api_access({"skep.api": "all"})


def test_managers_of_other_versions_can_read_what_a_node_reports() -> None:
    assert reported_rights(ALL_RIGHTS) == "all", "also where one does not know every kind"
    assert reported_rights(frozenset((Right.GPUS, Right.DEVICES))) == "devices,gpus"


def test_the_cluster_names_what_it_allows() -> None:
    assert allowed_rights("all") == ALL_RIGHTS
    assert allowed_rights("none") == allowed_rights("") == frozenset()
    assert allowed_rights("gpus, devices") == {Right.GPUS, Right.DEVICES}
    assert rights_text(ALL_RIGHTS) == "api,api-inspect,devices,gpus,namespaces,privileged,processes,resources"
    assert allowed_by({"skep.allow": "everything"}) == frozenset()
    with pytest.raises(InvalidArgument, match="expected all, none, or some of privileged"):
        check_swarm_labels({"skep.allow": "devices,everything"})


NODE = {DEVICES_LABEL: "/dev/fuse,/dev/snd/pcm0", CDI_LABEL: "acme.com/gpu=0,acme.com/gpu=1,acme.com/gpu=all"}


@pytest.mark.parametrize(
    ("labels", "missing"),
    [
        ({"devices": "/dev/fuse,/dev/snd"}, ()),
        ({"devices": "/dev/ttyUSB0"}, ("/dev/ttyUSB0",)),
        ({"devices": "/dev/sn"}, ("/dev/sn",)),
        ({"devices": "/dev/loop0,/opt/device"}, ()),
        ({"devices": "acme.com/gpu=0"}, ()),
        ({"devices": "acme.com/gpu=7"}, ("acme.com/gpu=7",)),
        ({"gpus": "all"}, ()),
        ({"gpus": "2"}, ()),
        ({"gpus": "3"}, ("3 GPUs (it has 2)",)),
        ({"gpus": "device=1,5"}, ("GPU 5",)),
        ({"shm_size": "1g"}, ()),
    ],
)
def test_a_node_lacks_devices_that_it_does_not_list(labels: dict[str, str], missing: tuple[str, ...]) -> None:
    assert missing_devices(rights(**labels), NODE) == missing


def test_a_node_whose_list_is_cut_short_may_have_any_device() -> None:
    wanted = rights(devices="/dev/ttyUSB0,acme.com/gpu=7")
    assert missing_devices(wanted, {DEVICES_LABEL: "/dev/a,...", CDI_LABEL: "..."}) == ()


def test_devices_that_come_and_go_by_themselves_are_not_listed() -> None:
    assert all(
        map(
            is_listed,
            ("/dev/ttyUSB0", "/dev/ttyS0", "/dev/fuse", "/dev/net/tun", "/dev/serial/by-id/x", "/dev/sda"),
        )
    )
    assert not any(
        map(is_listed, ("/dev/tty", "/dev/tty1", "/dev/loop3", "/dev/null", "/dev/disk/by-id/x", "/mnt/x"))
    )

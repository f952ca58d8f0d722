"""The record of a container on disk.  The only I/O is a file in memory or in a temporary directory."""

import errno
from pathlib import Path

import msgspec
import pytest

from skep.engine.containers import records
from skep.engine.containers.container import Container, ContainerConfig, PlainOptions, RestartPolicy
from skep.errors import Unavailable
from skep.model.networks.sandbox import Endpoint, EndpointConfig, PublishedPort, Sandbox
from skep.model.networks.tables import NetworkHead
from skep.model.values.ids import ContainerId, NetworkId, TaskId
from tests.support.file_faults import file_faults


def a_container(**fields: object) -> Container:
    defaults = {"name": "c", "image": "i", "image_id": "sha256:i", "config": ContainerConfig(path="true")}
    return Container(id=ContainerId("c" * 64), **{**defaults, **fields})  # type: ignore[arg-type]


def test_the_newest_record_counts(tmp_path: Path) -> None:
    path = tmp_path / "record"
    for name in ("a", "b", "c"):
        records.write(path, a_container(name=name))
    assert records.read(path) == a_container(name="c")


def test_a_torn_line_spoils_neither_what_was_before_nor_what_follows(tmp_path: Path) -> None:
    path = tmp_path / "record"
    records.write(path, a_container(name="a"))
    with path.open("a") as file:
        file.write('\n{"id": "')
    assert records.read(path) == a_container(name="a")
    records.write(path, a_container(name="b"))
    assert records.read(path) == a_container(name="b")


def test_a_record_that_changes_for_ever_keeps_its_size_bounded(tmp_path: Path) -> None:
    path = tmp_path / "record"
    for number in range(1000):
        records.write(path, a_container(exit_code=number))
    newest = records.read(path)
    assert newest is not None
    assert newest.exit_code == 999
    assert path.stat().st_size < 2 * records.BYTES_MAX
    assert [entry.name for entry in tmp_path.iterdir()] == ["record"]


def test_where_no_line_can_be_read_there_is_no_record(tmp_path: Path) -> None:
    assert records.read(tmp_path / "record") is None
    (tmp_path / "record").write_bytes(b"\n{\n\n[]")
    assert records.read(tmp_path / "record") is None


def test_a_disk_that_does_not_give_a_record_makes_no_container_unknown(tmp_path: Path) -> None:
    assert records.read(tmp_path / "missing") is None
    (tmp_path / "record").mkdir()
    assert records.read(tmp_path / "record") is None, "what is no file is no record"
    with file_faults(tmp_path) as faults:
        faults.choose(errno.EIO, lambda call, path: (call, path.name) == ("open", "record"))
        with pytest.raises(Unavailable, match="cannot be read"):
            records.read(tmp_path / "record")


def test_records_are_read_by_the_versions_before() -> None:
    """A node process of another version adopts the containers: serialized names do not follow the attributes'."""
    head = NetworkHead(id=NetworkId("n1"), name="web")
    config = EndpointConfig(head=head, addresses=("10.0.1.5/24",), attachment=TaskId("t1"))
    endpoint = Endpoint(config=config, interface="eth0", port="p1", mac_address="02:42:0a:00:01:05")
    sandbox = Sandbox(
        netns="/ns", endpoints=(endpoint,), ports=(PublishedPort(target_port=80, host_ip="127.0.0.1"),)
    )
    container = a_container(
        sandbox=sandbox,
        plain=PlainOptions(restart=RestartPolicy(name="always"), is_stopped=True),
        config=ContainerConfig(path="sh", endpoints=(config,)),
    )
    record = msgspec.json.decode(msgspec.json.encode(container))
    assert record["config"]["places"][0]["addresses"] == ["10.0.1.5/24"]
    assert record["endpoint"]["netns"] == "/ns"
    assert record["endpoint"]["places"][0]["place"]["head"]["id"] == "n1"
    assert record["endpoint"]["places"][0]["place"]["attachment"] == "t1"
    assert record["plain"]["restart"]["name"] == "always"
    assert msgspec.convert(record, Container, strict=False) == container

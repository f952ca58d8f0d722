"""Ports that a node reports as used."""

from msgspec.structs import replace

from skep.model.networks import used_ports
from skep.model.networks.used_ports import PORTS_MAX, ports_label, used_ports_of
from tests.support.builders import a_node


def read(label: str) -> frozenset[tuple[str, int]]:
    node = a_node("n1")
    engine = replace(node.description.engine, labels={"skep.ports": label})
    return used_ports_of(replace(node, description=replace(node.description, engine=engine)))


def test_ports_are_read_as_they_were_written() -> None:
    ports = {("tcp", 80), ("tcp", 22), ("udp", 53)}
    assert ports_label(ports) == "tcp=22,80 udp=53"
    assert read(ports_label(ports)) == ports
    assert ports_label(()) == ""


def test_long_labels_are_not_remembered() -> None:
    before = used_ports.cached_answer.cache_info().currsize
    for first in range(1, 20):
        assert len(read(ports_label(("tcp", number) for number in range(first, first + 900)))) == 900
    assert used_ports.cached_answer.cache_info().currsize == before
    assert read("tcp=4711") == {("tcp", 4711)}
    assert used_ports.cached_answer.cache_info().currsize == before + 1


def test_a_label_is_bounded_and_what_cannot_be_read_is_ignored() -> None:
    assert len(read(ports_label(("tcp", number) for number in range(1, 60000)))) == PORTS_MAX
    assert read("tcp=x,80, =7 udp tcp=999999 sctp=\u0663") == {("tcp", 80), ("", 7)}

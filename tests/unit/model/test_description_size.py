"""A node's description is cut to one size, parts by their rank, and the node says so."""

from collections.abc import Mapping
from typing import Any, Final

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from skep.model.networks.used_ports import ports_label, used_ports_of
from skep.model.node import CSIInfo, EngineDescription, EnginePlugin, Node, NodeDescription, Topology
from skep.model.node_reports.conditions import condition_messages
from skep.model.node_reports.description_size import DESCRIPTION_BYTES_MAX, size_condition, within_size
from skep.model.options.slot_volumes import SlotVolume, slot_volumes_label, slot_volumes_of
from skep.model.service import DiscreteResource, GenericResource, Platform, Resources
from skep.model.values.encoding import to_json
from skep.model.values.meta import TLSInfo
from skep.node.host.description import listed
from tests.support.builders import a_node


def ports(count: int) -> str:
    return ports_label((protocol, 20000 + n) for n in range(count) for protocol in ("tcp", "udp", "sctp"))


def slots(count: int) -> str:
    found = (SlotVolume(f"shop_{n:04}_data", f"shop-customer-{n:04}_db", 1, 10**12 + n) for n in range(count))
    return slot_volumes_label(found)


AT_MOST: Final[Mapping[str, str]] = {
    "skep.ports": ports(1000),
    "skep.devices": listed(f"/dev/mapper/vg0-lv_customer_{n:04}" for n in range(2000)),
    "skep.cdi": listed(f"nvidia.com/gpu=MIG-{n:032x}" for n in range(2000)),
    "skep.routes": " ".join(f"10.{n}.0.0/16=enp0s{n}f0np0" for n in range(64)),
    "skep.slot-volumes": slots(2000),
    **{f"skep.condition.c{n:02}": "x" * 300 for n in range(15)},
}
DRIVERS: Final = tuple(
    CSIInfo(plugin_name=f"d{n}", node_id="x" * 900, accessible_topology=Topology(segments={"zone": "z" * 80}))
    for n in range(15)
)


def described(labels: Mapping[str, str], **other: Any) -> NodeDescription:
    engine = EngineDescription(engine_version="1", labels={"skep.node": "true", **labels})
    return NodeDescription(hostname="big1", engine=engine, **other)


def bounded(description: NodeDescription) -> NodeDescription:
    """Cut, and what is true of every cut."""
    cut = within_size(description)
    size = len(to_json(cut))
    assert size <= DESCRIPTION_BYTES_MAX
    assert within_size(cut) is cut
    assert msgspec.json.decode(to_json(cut), type=NodeDescription) == cut
    if cut is not description:
        assert size_condition(cut) in condition_messages(cut)
        assert size_condition(cut).startswith("this node's description is larger than 64 KiB")
    return cut


def node(description: NodeDescription) -> Node:
    return replace(a_node(), description=description)


@pytest.mark.parametrize("name", [*AT_MOST, ""])
def test_no_part_is_cut_that_is_at_its_own_bound_alone(name: str) -> None:
    description = (
        described({name: AT_MOST[name]} if name in AT_MOST else {})
        if name
        else described({}, csi_info=DRIVERS)
    )
    assert bounded(description) is description


def test_ports_are_cut_first_and_by_no_more_than_needed() -> None:
    description = described(AT_MOST, csi_info=DRIVERS)
    labels = {**AT_MOST, "skep.devices": "", "skep.cdi": AT_MOST["skep.cdi"][:12000]}
    description = described(labels, csi_info=DRIVERS[:4])
    cut = bounded(description)
    assert "without some ports in use;" in size_condition(cut)
    assert 0 < len(used_ports_of(node(cut))) < 3000
    assert used_ports_of(node(cut)) < used_ports_of(node(description))
    assert {number for _, number in used_ports_of(node(cut))} == set(
        range(20000, 20000 + len(used_ports_of(node(cut))) // 3)
    ), "the lowest of each protocol"
    assert len(to_json(cut)) > DESCRIPTION_BYTES_MAX - 2048
    rest = {name: value for name, value in cut.engine.labels.items() if name != "skep.ports"}
    assert rest.items() >= {name: value for name, value in labels.items() if name != "skep.ports"}.items()


def test_with_every_part_at_its_bound_what_says_where_data_is_stays_longest() -> None:
    cut = bounded(described({**AT_MOST, "zone": "a"}, csi_info=DRIVERS))
    words = size_condition(cut)
    assert "ports in use, devices" in words
    assert "slots" not in words
    assert cut.engine.labels["skep.slot-volumes"] == AT_MOST["skep.slot-volumes"]
    assert cut.engine.labels["skep.devices"] == "..."
    assert cut.engine.labels["skep.cdi"].endswith(",...")
    assert (cut.engine.labels["zone"], cut.csi_info) == ("a", DRIVERS)


def test_the_condition_is_among_those_that_are_shown() -> None:
    conditions = {f"skep.condition.c{n:02}": "x" for n in range(20)}
    cut = bounded(described({**conditions, "rack": "x" * 80_000}))
    assert len(condition_messages(cut)) == 16


def test_of_too_many_slots_the_latest_stay() -> None:
    words = " ".join(f"shop_{n:04}_data=shop-customer-{n:04}_db.1@{10**12 - n}" for n in range(4000))
    cut = bounded(described({"skep.slot-volumes": words}))
    kept = slot_volumes_of(node(cut))
    assert kept == slot_volumes_of(node(described({"skep.slot-volumes": words})))[: len(kept)]
    assert len(kept) > 500


@pytest.mark.parametrize(
    ("large", "words"),
    [
        (described({"rack": "x" * 80_000, "zone": "a"}), "engine labels (1)"),
        (described({f"l{n}": "x" * 100 for n in range(2000)}), "engine labels ("),
        (described({}, csi_info=DRIVERS * 20), "CSI drivers"),
        (
            replace(described({}), engine=EngineDescription(plugins=(EnginePlugin(name="x" * 90_000),))),
            "plug-ins",
        ),
        (replace(described({}), hostname="x" * 90_000), "names and certificates"),
        (replace(described({}), platform=Platform(os="x" * 90_000)), "names and certificates"),
        (replace(described({}), tls_info=TLSInfo(trust_root="x" * 90_000)), "names and certificates"),
        (
            described(
                {},
                resources=Resources(
                    nano_cpus=4,
                    generic_resources=tuple(
                        GenericResource(discrete_resource_spec=DiscreteResource(kind=f"gpu{n}", value=1))
                        for n in range(2000)
                    ),
                ),
            ),
            "generic resources",
        ),
    ],
    ids=lambda one: one if isinstance(one, str) else "",
)
def test_any_part_that_is_too_large_alone_is_cut(large: NodeDescription, words: str) -> None:
    cut = bounded(large)
    assert words in size_condition(cut)
    assert cut.hostname == large.hostname[:255]
    assert cut.resources.nano_cpus == large.resources.nano_cpus
    assert cut.engine.labels.get("zone") == large.engine.labels.get("zone")


texts = st.builds(
    lambda text, times: text * times, st.text(max_size=5), st.sampled_from([1, 100, 9000, 30_000])
)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from([*AT_MOST, "zone", "skep.condition.description-size", 'a\n"b']), texts, max_size=8
    ),
    st.lists(texts, max_size=3),
    texts,
)
def test_whatever_a_node_sends_fits(labels: Mapping[str, str], plugins: list[str], hostname: str) -> None:
    engine = EngineDescription(labels=labels, plugins=tuple(EnginePlugin(name=name) for name in plugins))
    bounded(NodeDescription(hostname=hostname, engine=engine))

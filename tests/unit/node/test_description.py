"""What a node announces: tasks are placed by it."""

from pathlib import Path

import pytest
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.configuration.configuration import Configuration
from skep.engine.log_drivers.options import JOURNAL
from skep.model.node import EngineDescription, NodeDescription
from skep.model.node_reports.conditions import BOOT_LABEL, condition_messages
from skep.model.options.constraints import is_satisfied
from skep.model.service import DiscreteResource, GenericResource, NamedResource
from skep.model.values.user_map import IdRange, UserMap
from skep.node.host.conditions import Conditions
from skep.node.host.description import NodeDescriber, generic_resources, user_labels, within_bounds
from skep.node.host.features import Features
from skep.node.host.machine import Machine
from skep.node.host.machine_resources import ResourceReader
from tests.support.builders import a_node

MACHINE = Machine(
    hostname="w1",
    architecture="x86_64",
    kernel="6.1",
    os_name="Debian",
    os_version="12",
    cpus=2,
    memory_bytes=1 << 30,
    distribution="debian",
    boot_id="b1",
)


def described(features: Features, journal: Path = JOURNAL) -> NodeDescription:
    offers = ResourceReader(SystemClock(), Configuration)
    conditions = Conditions(SystemClock())
    return NodeDescriber(
        MACHINE, features, offers, conditions, dict, image_port=lambda: 0, has_probes=False
    ).describe(journal=journal)


def plugins(description: NodeDescription, type: str) -> set[str]:
    return {one.name for one in description.engine.plugins if one.type == type}


def test_the_log_drivers_that_the_node_has_are_announced(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    everywhere = {"json-file", "local", "syslog", "gelf", "fluentd", "splunk"}
    assert plugins(described(Features(), journal), "Log") == everywhere
    journal.touch()
    assert plugins(described(Features(), journal), "Log") == {*everywhere, "journald"}


def test_a_description_that_is_cut_is_a_condition_of_the_node_until_it_fits() -> None:
    conditions = Conditions(SystemClock())
    small = described(Features())
    engine = replace(small.engine, labels={**small.engine.labels, "rack": "x" * 80_000})
    cut = within_bounds(replace(small, engine=engine), conditions)
    (warning,) = conditions.warnings()
    assert "engine labels (1)" in warning
    assert warning in condition_messages(cut)
    assert within_bounds(small, conditions) is small
    assert conditions.warnings() == ()


def test_constraints_read_the_facts_that_a_node_announces() -> None:
    node = replace(a_node("w1"), description=described(Features(cgroup_version=1)))
    for met in (
        "kernel == 6.1",
        "cgroup < 2",
        "distribution in (debian)",
        "distribution-version >= 12",
        "cpus == 2",
    ):
        assert is_satisfied((f"node.facts.{met}",), node), met


def test_a_node_that_maps_users_has_a_fact_to_constrain_by() -> None:
    users = UserMap(uids=(IdRange(0, 100000, 65536),), gids=(IdRange(0, 100000, 65536),))
    for found, fact in ((users, "node.facts.userns == remap"), (None, "node.facts.userns != remap")):
        engine = EngineDescription(engine_version="1", labels=user_labels(found))
        node = replace(a_node("w1"), description=replace(a_node("w1").description, engine=engine))
        assert is_satisfied((fact,), node)


def test_what_every_node_has_is_announced() -> None:
    description = described(Features())
    assert description.engine.labels[BOOT_LABEL] == "b1"
    assert plugins(description, "Volume") == {"local"}
    assert plugins(description, "Secret") == {"skep-env"}
    assert (description.resources.nano_cpus, description.resources.memory_bytes) == (2 * 10**9, 1 << 30)


@pytest.mark.parametrize("feature", ["veth", "bridge", "vxlan", "nftables"])
def test_overlay_networks_are_announced_where_they_work(feature: str) -> None:
    assert "overlay" in plugins(described(Features()), "Network")
    assert "overlay" not in plugins(described(Features(missing={feature: "not in this kernel"})), "Network")


def test_devices_of_cdi_are_resources_beside_the_configured_ones() -> None:
    ssd = GenericResource(discrete_resource_spec=DiscreteResource(kind="ssd", value=2))
    found = generic_resources(Configuration(generic_resources=(ssd,)), ["acme.com/gpu=0", "acme.com/gpu=1"])
    named = [one.named_resource_spec for one in found]
    gpus = [NamedResource(kind="acme.com/gpu", value=name) for name in ("0", "1")]
    assert (found[0], named[1:]) == (ssd, gpus)

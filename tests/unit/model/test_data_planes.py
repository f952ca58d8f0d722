"""Which data plane a network belongs to, and which kind a node is."""

from msgspec.structs import replace

from skep.model.network import NetworkSpec
from skep.model.networks.data_planes import (
    DOCKER,
    NODE_LABEL,
    PLANE_OPTION,
    SKEP,
    is_docker_node,
    plane_of,
    plane_of_node,
)
from skep.model.node import EngineDescription, NodeCertificate
from skep.model.values.meta import Driver
from tests.support.builders import a_docker_node, a_node, an_overlay


def test_a_node_is_what_it_says_of_itself() -> None:
    engine = a_docker_node()
    ours = replace(
        engine,
        description=replace(
            engine.description, engine=EngineDescription(engine_version="0.1.0", labels={NODE_LABEL: "true"})
        ),
    )
    assert is_docker_node(engine)
    assert not is_docker_node(ours)
    assert not is_docker_node(a_node())  # it has not described itself yet
    assert (plane_of_node(engine), plane_of_node(ours)) == (DOCKER, SKEP)


def test_a_node_is_what_it_joined_as_whatever_it_says() -> None:
    """A worker that leaves out a label, or adds one, gets none of the other kind's keys."""
    joined_as = {plane: NodeCertificate(plane=plane) for plane in (DOCKER, SKEP)}
    silent = a_docker_node()
    saying = replace(
        silent,
        description=replace(
            silent.description, engine=EngineDescription(engine_version="0.1.0", labels={NODE_LABEL: "true"})
        ),
    )
    for node in (silent, saying):
        assert is_docker_node(replace(node, certificate=joined_as[DOCKER]))
        assert not is_docker_node(replace(node, certificate=joined_as[SKEP]))
    assert not is_docker_node(replace(a_node(), certificate=joined_as[DOCKER]))  # not described yet


def test_an_allocated_value_takes_precedence_over_the_requested_one() -> None:
    requesting = an_overlay(subnet="", labels={PLANE_OPTION: SKEP})
    assert plane_of(an_overlay()) == ""
    assert plane_of(requesting) == SKEP
    by_option = NetworkSpec(
        name="n", driver_configuration=Driver(name="overlay", options={PLANE_OPTION: DOCKER})
    )
    assert plane_of(replace(requesting, spec=by_option)) == DOCKER
    assert (
        plane_of(replace(requesting, driver_state=Driver(name="overlay", options={PLANE_OPTION: DOCKER})))
        == DOCKER
    )

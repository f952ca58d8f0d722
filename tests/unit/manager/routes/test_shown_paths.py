"""What the status of a node tells of its ways to others."""

from msgspec.structs import replace

from skep.manager.routes.representations import Problems, shown_node
from skep.model.node import CutOff, FailingPath, NodeState
from skep.model.options.labels import IGNORE_PATHS
from skep.model.values.ids import NodeId
from tests.support.builders import a_node

NO_PROBLEMS = Problems(freeze=None, damages={})
CUT_OFF = CutOff(check="overlay", port="4789/udp", peers=("w2",))


def failing(*peers: str) -> tuple[FailingPath, ...]:
    return tuple(
        FailingPath(peer=NodeId(peer), hostname=peer, check="overlay", port="4789/udp") for peer in peers
    )


def message(**fields: object) -> str:
    labels = fields.pop("labels", None)
    state = fields.pop("state", NodeState.READY)
    node = replace(a_node(labels=labels, state=state), **fields)  # type: ignore[arg-type]
    shown = shown_node(NO_PROBLEMS, node)
    assert (shown.failing_paths, shown.cut_off) == ((), ())
    return shown.status.message


def test_a_node_whose_paths_are_well_says_nothing() -> None:
    assert message() == ""


def test_pair_and_port_are_named() -> None:
    assert message(failing_paths=failing("w2")) == "cannot reach w2 4789/udp (overlay)"
    many = message(failing_paths=failing(*(f"w{number}" for number in range(9))))
    assert many.endswith("w3 4789/udp (overlay) and 5 more")


def test_a_node_that_takes_no_tasks_says_why_unless_it_takes_them_all_the_same() -> None:
    said = "takes no tasks on overlay networks: 4789/udp fails between this node and w2"
    assert message(cut_off=(CUT_OFF,)) == said
    assert message(cut_off=(CUT_OFF,), labels={IGNORE_PATHS: "true"}) == ""
    secret = replace(CUT_OFF, check="encrypted", port="4799/udp")
    assert message(cut_off=(secret,)).startswith("takes no tasks on encrypted overlay networks: 4799/udp")


def test_of_a_node_that_is_down_only_that_counts() -> None:
    assert message(cut_off=(CUT_OFF,), failing_paths=failing("w2"), state=NodeState.DOWN) == ""

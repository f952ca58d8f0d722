"""What a removed node reads in the refusal of a manager."""

import pytest

from skep.model.node_reports.node_removal import NodeRemoval, removal_in
from skep.model.values.ids import NodeId
from skep.model.values.times import Timestamp

W1 = NodeId("w1")
AT = Timestamp("2026-01-02T03:04:05.123456789Z")


@pytest.mark.parametrize("removal", [NodeRemoval(at=AT), NodeRemoval(at=AT, keeps_containers=True)])
def test_a_node_reads_in_a_refusal_what_the_manager_has_written(removal: NodeRemoval) -> None:
    assert removal_in(removal.refusal(W1), W1) == removal


@pytest.mark.parametrize(
    "refusal", ["Permission denied: node w1 was removed from swarm", NodeRemoval().refusal(W1)]
)
def test_a_refusal_without_a_time_is_no_removal(refusal: str) -> None:
    """Older managers refuse nodes like that which a restored store does not have."""
    assert removal_in(refusal, W1) is None


@pytest.mark.parametrize(
    "refusal",
    [
        "Permission denied: node w2 was removed from the swarm at 2026-01-02T03:04:05Z",
        "Permission denied: node w1 is not part of the swarm",
        "Permission denied: this certificate in the name of node w1 does not belong to it",
        "cannot say: Permission denied: node w1 was removed from the swarm at 2026-01-02T03:04:05Z",
        "Permission denied: node w1 was removed from the swarm at 2026-01-02T03:04:05Z, perhaps",
    ],
)
def test_no_other_refusal_is_a_removal(refusal: str) -> None:
    assert removal_in(refusal, W1) is None


def test_the_sentence_has_the_time_and_the_next_command() -> None:
    assert NodeRemoval(at=AT).summary == (
        "this node was removed from the cluster at 2026-01-02T03:04:05Z: docker swarm leave --force "
        "(its containers stop)"
    )
    kept = NodeRemoval(keeps_containers=True).summary
    assert kept == (
        "this node was removed from the cluster: docker swarm leave --force (its containers keep running)"
    )

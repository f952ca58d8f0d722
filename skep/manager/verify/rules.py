"""The invariants that the stored state shows, and the meanings of their violations."""

from typing import Final, TypeAlias

import msgspec

from skep.model.task import Task
from skep.store.interface import Object


class Invariant(msgspec.Struct, frozen=True):
    """An invariant: the meaning of its violation, and the advice."""

    meaning: str
    action: str


_RECREATE: Final = "Recreate the tasks: docker service update --force SERVICE."

RULES = {
    "slot": Invariant(
        "A slot of a service has more tasks than one, so the service runs more tasks than its spec says.",
        "Scale the service down and up again.",
    ),
    "job": Invariant(
        "A job has more tasks at a time than its limit.", "Remove the job, or wait until its run has ended."
    ),
    "name": Invariant(
        "Two services have one name, so the name resolves to only one of them.",
        "Remove one of the services by its ID.",
    ),
    "address": Invariant(
        "Two objects hold one address or published port, so connections may reach the wrong one.",
        "Recreate the tasks of one of them: docker service update --force SERVICE.",
    ),
    "network": Invariant(
        "Two networks share a VXLAN ID or a subnet, so that their packets may mix.",
        "Create one of the networks again, and move its services there.",
    ),
    "unreachable": Invariant(
        "A task runs without an address on one of its networks, so nothing reaches it there.", _RECREATE
    ),
    "host-port": Invariant("Two tasks on a node hold the same port of the machine.", _RECREATE),
    "overcommitted": Invariant(
        "Tasks on a node have reserved more than the node has.",
        "Drain the node and activate it again, or lower reservations.",
    ),
    "copies": Invariant("A node has more tasks of a service than the service allows on a node.", _RECREATE),
    "constraints": Invariant("A task runs on a node that does not meet its constraints.", _RECREATE),
    "volume": Invariant(
        "Tasks use a cluster volume that they cannot share, so its data may be damaged.",
        "Scale one of the services to 0 now, and check the data.",
    ),
    "reference": Invariant(
        "A service uses a secret or config that does not exist, so new tasks cannot start.",
        "Create it again, and update the service with the new one.",
    ),
    "leftover": Invariant(
        "Records are kept that belong to nothing any longer, and fill the store.",
        "Restart the leader's daemon, so that another manager leads and cleans up.",
    ),
    "backwards": Invariant(
        "The state of a task went back, so a part of the cluster works with old data.",
        "Run skep doctor. After a restore of single machines, restore the whole cluster.",
    ),
}
"""Rules by name, the most urgent first within their subject.  The simulation checks the same functions."""


ViolationKey: TypeAlias = tuple[str, tuple[str, ...]]
"""A rule, and the ids of the objects that violate it."""


class InvariantViolation(msgspec.Struct, frozen=True):
    """One violation.

    Attributes:
        text: The objects and values that violate the rule.
        objects: The objects that have to be unchanged for the violation to count as lasting.
        ids: Further ids, such as of the node on which the tasks are.
    """

    rule: str
    text: str
    objects: tuple[Object, ...]
    ids: tuple[str, ...] = ()

    @property
    def key(self) -> ViolationKey:
        """Return what identifies the violation in the next check, although its text may differ by then."""
        return self.rule, tuple(sorted((*map(id_of, self.objects), *self.ids)))

    @property
    def subjects(self) -> tuple[str, ...]:
        """Return the ids of all objects that the violation is about."""
        found = [*map(id_of, self.objects), *self.ids]
        found += [one.service_id for one in self.objects if isinstance(one, Task) and one.service_id]
        return tuple(dict.fromkeys(found))


def id_of(object: Object) -> str:
    """Return the object's id."""
    return str(getattr(object, "id", ""))

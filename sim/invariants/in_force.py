"""The rules that are in force.  Each of these needs a fix in the product, without which every run that meets it fails.

A rule that is off is not checked, and the state that it forbids counts as allowed.
"""

from typing import Final

ATTEMPTS: Final = "only a task that fails uses up an attempt of its slot"
SHRINKING: Final = "a request that takes less of a quota is not refused"
DEPENDENCIES: Final = "a service does not wait for a job that has completed and removed itself"
UPDATES: Final = "an update whose image is good ends, whatever its tasks hold"
START_FIRST: Final = "a start-first update is refused where new and old tasks cannot share a volume"
DRY_RUN: Final = "a service that the dry run accepts gets its tasks"
DUE_TIMES: Final = "a due time is skipped, and a task of a run made, only for what is true of its nodes then"
WRITERS: Final = "a volume for one node has one writer, whatever the store says"
ONLY_COPIES: Final = "the leader does not remove a node with the only data of a slot that has to return to it"
REMAINS: Final = "objects at rest belong to objects that are there"
VISITS: Final = "one event of a node makes the loops look up objects of that node, not of all nodes"
RETRIES: Final = "a retried slot has no more attempts than its policy allows"

ALL: Final = (
    *(ATTEMPTS, SHRINKING, DEPENDENCIES, UPDATES, START_FIRST, DRY_RUN),
    *(DUE_TIMES, WRITERS, ONLY_COPIES, REMAINS, RETRIES, VISITS),
)
IN_FORCE: set[str] = set(ALL)
"""The rules that are checked."""


def is_in_force(rule: str) -> bool:
    """Whether ``rule`` is checked."""
    return rule in IN_FORCE

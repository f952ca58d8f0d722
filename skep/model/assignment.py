"""Assignments: what a node is told to run, with everything its tasks need.

Made by the dispatcher, carried by the wire, taken by the node; never stored as such.
"""

from collections.abc import Mapping

import msgspec

from skep.model.ids import ConfigId, SecretId, TaskId
from skep.model.meta import Driver
from skep.model.task import AssignedTask


class SecretFile(msgspec.Struct, frozen=True, kw_only=True):
    """A secret with its data, for the tasks that refer to it.  Never written to a disk."""

    id: SecretId
    name: str = ""
    data: bytes = b""
    templating: Driver | None = None

    def __repr__(self) -> str:
        return f"SecretFile(id={self.id!r}, name={self.name!r}, {len(self.data)} bytes)"


class ConfigFile(msgspec.Struct, frozen=True, kw_only=True):
    """A config with its data, for the tasks that refer to it."""

    id: ConfigId
    name: str = ""
    data: bytes = b""
    templating: Driver | None = None


class AssignmentSet(msgspec.Struct, frozen=True, kw_only=True):
    """One message of assignments.

    ``complete``: this is everything; what is not named here is no longer assigned (the ``removed_*`` are
    empty then).  Otherwise it is a difference to what was assigned before: named objects are new or replace
    those with the same id.  What a task refers to comes in the same set as the task, or came before.
    """

    complete: bool
    revision: int = 0
    """Revision of the manager's store that this set shows; 0 from managers that do not say (Docker's).  The
    agent never hands over a set whose revision lies before that of an earlier one."""
    tasks: tuple[AssignedTask, ...] = ()
    removed_tasks: tuple[TaskId, ...] = ()
    secrets: tuple[SecretFile, ...] = ()
    removed_secrets: tuple[SecretId, ...] = ()
    configs: tuple[ConfigFile, ...] = ()
    removed_configs: tuple[ConfigId, ...] = ()
    registry_auths: Mapping[TaskId, str] = {}
    """Registry credentials (``X-Registry-Auth``: base64 of JSON) of tasks in ``tasks`` that have some."""

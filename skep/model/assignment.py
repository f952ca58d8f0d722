"""Assignments: the tasks that a node must run, with everything they need.

The dispatcher makes them and sends them to the node.  They are never stored in this form.
"""

from collections.abc import Mapping

import msgspec

from skep.model.task import AssignedTask
from skep.model.values.ids import ConfigId, SecretId, TaskId
from skep.model.values.meta import Driver
from skep.model.volume import VolumeAssignment


class SecretFile(msgspec.Struct, frozen=True, kw_only=True):
    """A secret with its data, for the tasks that refer to it.  A node keeps it in memory only."""

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

    A ``complete`` set lists everything that is assigned.  Objects that it does not list are no longer assigned, and its
    ``removed_*`` fields are empty.  Any other set is a change to the earlier sets: its objects are added, or replace
    those with the same id.  A task's objects are in the same set as the task or in an earlier one.
    """

    complete: bool
    revision: int = 0
    """Revision of the manager's store; 0 from managers that do not send it (Docker's).  The agent ignores a set with a
    lower revision than an earlier one."""
    tasks: tuple[AssignedTask, ...] = ()
    removed_tasks: tuple[TaskId, ...] = ()
    secrets: tuple[SecretFile, ...] = ()
    removed_secrets: tuple[SecretId, ...] = ()
    configs: tuple[ConfigFile, ...] = ()
    removed_configs: tuple[ConfigId, ...] = ()
    volumes: tuple[VolumeAssignment, ...] = ()
    """Cluster volumes that are published on the node."""
    removed_volumes: tuple[VolumeAssignment, ...] = ()
    """Volumes that the node must release.  Complete sets list them too, because the node has to report when it has
    released them or never had them.
    """
    registry_auths: Mapping[TaskId, str] = {}
    """Registry credentials (``X-Registry-Auth``: base64 of JSON) of tasks in ``tasks``."""

"""Assignments: the tasks that a node must run, with everything they need.

The dispatcher makes them and sends them to the node.  They are never stored in this form.
"""

from collections.abc import Mapping

import msgspec

from skep.model.ids import ConfigId, SecretId, TaskId
from skep.model.meta import Driver
from skep.model.task import AssignedTask
from skep.model.volume import VolumeAssignment


class SecretFile(msgspec.Struct, frozen=True, kw_only=True):
    """A secret with its data, for the tasks that refer to it.  Must not be written to disk."""

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

    If ``complete``, it contains everything that is assigned, and missing objects are no longer assigned (the
    ``removed_*`` are then empty).  Otherwise it is a difference to earlier messages, whose objects are new or replace
    those with the same id.  Objects that a task refers to are in the same set as the task or in an earlier one.
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
    """Volumes to release, also in a complete set.  The node reports when it has released them or never had them."""
    registry_auths: Mapping[TaskId, str] = {}
    """Registry credentials (``X-Registry-Auth``: base64 of JSON) of tasks in ``tasks``."""

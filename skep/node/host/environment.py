"""The environment of a node: facts about its machine, and objects that it shares with the daemon."""

from collections.abc import Mapping
from random import Random

import msgspec

from skep.aio.clock import SystemClock
from skep.model.values.user_map import UserMap
from skep.node.host.conditions import Conditions
from skep.node.host.features import Features
from skep.node.host.machine import Machine
from skep.node.host.runtime_choice import RuntimeChoice
from skep.node.supervision.processes import NodeProcesses


class NodeEnvironment(msgspec.Struct, frozen=True, kw_only=True):
    """The environment of a node at its start.

    ``versions`` lists the programs that the node starts, and ``warnings`` are about the configuration.
    """

    machine: Machine
    features: Features
    versions: Mapping[str, str]
    runtimes: RuntimeChoice
    warnings: tuple[str, ...]
    clock: SystemClock
    random: Random
    conditions: Conditions
    processes: NodeProcesses
    users: UserMap | None = None
    """Mapping of the users of containers (``userns-remap``), or None."""

"""What a node finds when it starts: its machine, and what it shares with the daemon around it."""

from collections.abc import Mapping
from random import Random

import msgspec

from skep.aio.clock import SystemClock
from skep.node.conditions import Conditions
from skep.node.features import Features
from skep.node.machine import Machine
from skep.node.supervision.processes import NodeProcesses


class Environment(msgspec.Struct, frozen=True, kw_only=True):
    """``versions``: of the programs that the node starts; ``warnings``: sentences about the configuration."""

    machine: Machine
    features: Features
    versions: Mapping[str, str]
    warnings: tuple[str, ...]
    clock: SystemClock
    random: Random
    conditions: Conditions
    processes: NodeProcesses

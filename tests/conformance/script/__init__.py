"""The requests that a real engine and Skep are asked, in order, good and bad.

``{web}`` in a path or body stands for the id of what an earlier step named ``keep="web"`` made or showed,
``{web.version}`` for its version.
"""

from tests.conformance.script.cluster import AMBIGUOUS, LARGE, NODES, REMOVALS, SWARM
from tests.conformance.script.dialect import BAD_JSON, DIALECT, WRONG_TYPES
from tests.conformance.script.founding import BEFORE_INIT, INIT, INITS
from tests.conformance.script.objects import FILES, NETWORKS
from tests.conformance.script.odd_specs import ODD_SPECS
from tests.conformance.script.services import SERVICES, UPDATES
from tests.conformance.script.specs import BAD_SPECS
from tests.conformance.script.steps import Step, service

__all__ = [
    "AMBIGUOUS",
    "BAD_JSON",
    "BAD_SPECS",
    "BEFORE_INIT",
    "DIALECT",
    "FILES",
    "INIT",
    "INITS",
    "IN_SWARM",
    "LARGE",
    "NETWORKS",
    "NODES",
    "ODD_SPECS",
    "REMOVALS",
    "SERVICES",
    "SWARM",
    "UPDATES",
    "WRONG_TYPES",
    "Step",
    "service",
]

IN_SWARM = (
    *DIALECT,
    *BAD_JSON,
    *WRONG_TYPES,
    *BAD_SPECS,
    *FILES,
    *NETWORKS,
    *SERVICES,
    *UPDATES,
    *NODES,
    *SWARM,
    *REMOVALS,
    *AMBIGUOUS,
    *LARGE,
    *ODD_SPECS,
)
"""What a manager is asked, with the node it runs on kept as ``node``."""

"""What the objects of one stack may take together."""

from skep.model.encoding import ApiObject, always
from skep.model.ids import QuotaId
from skep.model.meta import Version
from skep.model.times import ZERO_TIME, Timestamp


class QuotaSpec(ApiObject):
    """Bounds for all objects of a stack together; 0: none.  ``name``: the stack's.

    Managers of older versions keep the fields after ``ports``, and do not enforce them.
    """

    name: str = ""
    tasks: int = always(0)
    nano_cpus: int = always(0)
    """Reserved, of all tasks."""
    memory_bytes: int = always(0)
    """Reserved, of all tasks."""
    ports: int = always(0)
    """Published."""
    networks: int = 0
    addresses: int = 0
    """IPv4 addresses in the subnets of its networks."""
    secrets: int = 0
    configs: int = 0
    """Revisions of the stack are configs."""
    data_bytes: int = 0
    """Data of its secrets and configs."""
    services: int = 0
    """Also those without tasks."""


class StackQuota(ApiObject):
    """A quota of a stack.  Writer: API."""

    id: QuotaId
    version: Version = always(Version())
    created_at: Timestamp = always(ZERO_TIME)
    updated_at: Timestamp = always(ZERO_TIME)
    spec: QuotaSpec = always(QuotaSpec())
    changes: int = 0
    """Of services under it: each writes this, so that two at one time are not both within the bound."""


class QuotaState(ApiObject):
    """A quota, and what of it is taken, in the same form."""

    quota: QuotaSpec
    used: QuotaSpec

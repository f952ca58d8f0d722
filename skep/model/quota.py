"""Quotas: limits for all objects of a stack together."""

from skep.model.values.encoding import ApiObject, always
from skep.model.values.ids import QuotaId
from skep.model.values.meta import Version
from skep.model.values.times import ZERO_TIME, Timestamp


class QuotaSpec(ApiObject):
    """Limits for all objects of the stack ``name`` together. 0 means no limit.

    Managers of older versions store the fields after ``ports`` but do not enforce them.
    """

    name: str = ""
    tasks: int = always(0)
    nano_cpus: int = always(0)
    """Reserved by all tasks."""
    memory_bytes: int = always(0)
    """Reserved by all tasks."""
    ports: int = always(0)
    """Published ports."""
    networks: int = 0
    addresses: int = 0
    """IPv4 addresses in the subnets of its networks."""
    secrets: int = 0
    configs: int = 0
    """Configs, including revisions of the stack."""
    data_bytes: int = 0
    """Data of its secrets and configs."""
    services: int = 0
    """Services, including those without tasks."""
    hosts: tuple[str, ...] = ()
    """Hosts of the front door that only the services of this stack may have, and no others.  Empty means no limit."""


class StackQuota(ApiObject):
    """A quota of a stack.  Writer: API."""

    id: QuotaId
    version: Version = always(Version())
    created_at: Timestamp = always(ZERO_TIME)
    updated_at: Timestamp = always(ZERO_TIME)
    spec: QuotaSpec = always(QuotaSpec())
    changes: int = 0
    """Counter of changes to the stack's services.  Each change writes it, so that two concurrent changes conflict and
    cannot exceed the quota together."""


class QuotaState(ApiObject):
    """A quota, and the use of it in the same form."""

    quota: QuotaSpec
    used: QuotaSpec

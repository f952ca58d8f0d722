"""The catalog: where each service can be reached, in the cluster and on machines outside.

``skep balance`` and ``skep catalog`` read it, and ``skep register`` adds services on machines outside of the cluster.
"""

from collections.abc import Mapping
from typing import Final

from skep.model.values.encoding import ApiObject, always

REGISTRATIONS_MAX: Final = 500
"""Largest number of registrations.  Each is written at every renewal, so they take 50 writes/s at the default lease."""
STACK_REGISTRATIONS_MAX: Final = 100
"""Largest number of registrations of one stack, so that users of one stack leave room for the others."""
TTL_S_MIN: Final = 5
"""Shortest lease in seconds.  A change of the leader, in which no renewal is accepted, takes about a second."""
TTL_S_MAX: Final = 3600
"""Longest lease in seconds, within which the catalog can show a machine that is lost."""
TTL_S: Final = 30
"""Default lease in seconds: three renewals, so that two may be lost."""
TAGS_MAX: Final = 32
"""Largest number of tags of one registration."""
TEXT_MAX: Final = 255
"""Longest tag, and longest address, in characters.  The longest DNS name has as many."""
WAIT_S_MAX: Final = 60.0
"""Longest time in seconds for which a request waits for a change of the catalog."""


class ServiceRegistration(ApiObject):
    """A service on a machine outside of the cluster.

    Attributes:
        instance: Name of the instance, unique within the service.
        stack: Stack whose users see and change it, or empty.
        ttl: Seconds after which it is removed unless its registrar renews it.
    """

    service: str = ""
    instance: str = ""
    address: str = ""
    port: int = 0
    tags: tuple[str, ...] = ()
    stack: str = ""
    ttl: int = TTL_S


class CatalogInstance(ApiObject):
    """One address of a service.

    Attributes:
        id: Id of the task, or the registration's instance.
        node: Name of the node, or the registration's instance.
        node_address: Address of the node, or of the registration.
        port: Port at ``address``, or 0 if the service publishes none.
        weight: Share of new connections in relation to the other instances.  It differs during a staged update.
    """

    id: str = always("")
    node: str = always("")
    node_address: str = always("")
    address: str = always("")
    port: int = always(0)
    weight: int = always(1)
    tags: tuple[str, ...] = always(())
    is_registered: bool = always(False)


class CatalogService(ApiObject):
    """A service with its instances, in order of their ids."""

    name: str = always("")
    stack: str = always("")
    tags: tuple[str, ...] = always(())
    instances: tuple[CatalogInstance, ...] = always(())


class ServiceCatalog(ApiObject):
    """All services that a user sees, in order of their names, and the addresses of the ready nodes by their names.

    Nodes with the same host name are named ``HOSTNAME-ID``.
    """

    services: tuple[CatalogService, ...] = always(())
    nodes: Mapping[str, str] = always({})


class CatalogAnswer(ApiObject):
    """The catalog with the digest of its content.  A request with this digest waits until the content differs."""

    digest: str = always("")
    catalog: ServiceCatalog | None = None
    """None if the client has this content already."""

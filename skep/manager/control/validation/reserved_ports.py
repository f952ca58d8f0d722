"""Ports that only administrators may have services publish on (``model.reserved_ports``)."""

from collections.abc import Iterator

from skep.manager.cluster import reserved_ports_of
from skep.model.service import ServiceSpec
from skep.store.interface import View


def reserved_ports(view: View, spec: ServiceSpec) -> Iterator[str]:
    """Yield the reserved ports that a service would publish, in ingress or host mode, with their uses."""
    ports = spec.endpoint_spec.ports if spec.endpoint_spec is not None else ()
    if not any(port.published_port for port in ports):
        return
    reserved = reserved_ports_of(view)
    for port in ports:
        if use := reserved.get((port.protocol, port.published_port)):
            yield f"the reserved port {port.published_port}/{port.protocol} ({use})"

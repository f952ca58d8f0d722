"""Ports that only administrators may have services publish on (``model.reserved_ports``)."""

from collections.abc import Iterator

from skep.model.node import Node
from skep.model.planes import data_path_port
from skep.model.reserved_ports import of_cluster
from skep.model.service import ServiceSpec
from skep.model.swarm import Swarm
from skep.store.interface import View


def reserved_ports(view: View, spec: ServiceSpec) -> Iterator[str]:
    """The reserved ports that a service would publish, in ingress or host mode, each with what it is for."""
    ports = spec.endpoint_spec.ports if spec.endpoint_spec is not None else ()
    if not any(port.published_port for port in ports):
        return
    reserved = of_cluster(data_path_port(view.find(Swarm)), view.find(Node))
    for port in ports:
        if use := reserved.get((port.protocol, port.published_port)):
            yield f"the reserved port {port.published_port}/{port.protocol} ({use})"

"""A container's end of a network: its interface, its port on the bridge, its MAC address."""

from skep.dataplane.addresses import mac_for
from skep.dataplane.gateway import new_port_name
from skep.model.sandbox import Endpoint, EndpointConfig


def connected_place(place: EndpointConfig, interface: str) -> Endpoint:
    """``place`` with ``interface`` in the container, and a port that no start of it had before."""
    mac = mac_for(one.partition("/")[0] for one in place.addresses)
    return Endpoint(config=place, interface=interface, port=new_port_name(), mac_address=mac)

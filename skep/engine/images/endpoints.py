"""Which registries are reached where, and how.

Source: moby 20.10, registry/{config,service_v2}.go.
"""

import ipaddress
from collections.abc import Mapping, Sequence
from urllib.parse import urlsplit

import msgspec

from skep.engine.images.reference import DEFAULT_DOMAIN

_DOCKER_IO_HOST = "registry-1.docker.io"


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """How registries are reached.

    ``insecure``: hosts (``name[:port]``) and networks (``10.0.0.0/8``) whose certificate is not checked and that may
    be reached without TLS; loopback always is one.  ``mirrors``: base URLs tried before Docker Hub.
    ``helpers``: registry -> the program ``docker-credential-NAME`` that has credentials for it.
    """

    insecure: frozenset[str] = frozenset()
    mirrors: tuple[str, ...] = ()
    helpers: Mapping[str, str] = {}

    def is_insecure(self, domain: str) -> bool:
        """Whether ``domain`` (``host[:port]``) may be reached without verified TLS."""
        host = urlsplit(f"//{domain}").hostname or ""
        if is_loopback(domain) or domain in self.insecure or host in self.insecure:
            return True
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            return False
        return any(address in network for network in map(_network, self.insecure) if network is not None)

    def endpoints(self, domain: str, *, to_push: bool = False) -> Sequence["Endpoint"]:
        """Base URLs to try for images of ``domain``, in this order.  Nothing is pushed to a mirror."""
        if domain == DEFAULT_DOMAIN and to_push:
            return (Endpoint(f"https://{_DOCKER_IO_HOST}"),)
        if domain == DEFAULT_DOMAIN:
            mirrors = [
                Endpoint(
                    mirror.rstrip("/"), verify=not self.is_insecure(urlsplit(mirror).netloc), mirror=True
                )
                for mirror in self.mirrors
            ]
            return (*mirrors, Endpoint(f"https://{_DOCKER_IO_HOST}"))
        if self.is_insecure(domain):
            return Endpoint(f"https://{domain}", verify=False), Endpoint(f"http://{domain}", verify=False)
        return (Endpoint(f"https://{domain}"),)


def is_loopback(domain: str) -> bool:
    """Whether ``domain`` (``host[:port]``) is this machine."""
    host = urlsplit(f"//{domain}").hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Endpoint(msgspec.Struct, frozen=True):
    """A base URL.  ``mirror``: the user's credentials are not for it."""

    url: str
    verify: bool = True
    mirror: bool = False


def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    try:
        return ipaddress.ip_network(text)
    except ValueError:
        return None

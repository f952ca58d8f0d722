"""The text of /etc/hosts and /etc/resolv.conf for a container, and the evaluation of the node's files."""

import ipaddress
from collections.abc import Iterable, Sequence
from pathlib import Path

_LOCAL = """\
127.0.0.1\tlocalhost
::1\tlocalhost ip6-localhost ip6-loopback
fe00::0\tip6-localnet
ff00::0\tip6-mcastprefix
ff02::1\tip6-allnodes
ff02::2\tip6-allrouters
"""
RESOLVER = Path("/etc/resolv.conf")
"""The node's own resolv.conf."""
NAME_SERVER = "127.0.0.11"
"""Address of the name server inside the namespace of a container on networks."""
_PUBLIC_NAME_SERVERS = ("8.8.8.8", "8.8.4.4")
"""Used, as in Docker, if a container cannot reach any name server of the node."""


def hosts_file(hostname: str, addresses: Iterable[str], extra: Iterable[str]) -> str:
    """Return /etc/hosts with the container's own ``addresses``.

    ``extra`` has lines of ``address name...``, in a service's format.
    """
    lines = []
    for line in extra:
        words = line.split()
        if len(words) >= 2:
            lines.append("\t".join((words[0], " ".join(words[1:]))))
    lines += [f"{address}\t{hostname}" for address in addresses]
    return _LOCAL + "".join(f"{line}\n" for line in lines)


def resolver_file(
    node: str,
    name_servers: Sequence[str],
    search_domains: Sequence[str],
    options: Sequence[str],
    *,
    is_named: bool = False,
) -> str:
    """Return a container's /etc/resolv.conf: the text ``node`` of the node's file, with the user's settings in place of
    the node's.

    Name servers on the node's loopback are left out, because they do not listen in the container's namespace.  With
    ``is_named`` the only name server is 127.0.0.11, which forwards other names to the servers of ``forwarded_to``.
    Source: moby, libnetwork/resolvconf (TransformForLegacyNw, TransformForIntNS).
    """
    words = _words(node)
    servers = list(name_servers) or [
        line[1] for line in words if len(line) > 1 and line[0] == "nameserver" and not _is_loopback(line[1])
    ]
    domains = list(search_domains)
    if not domains:
        searches = [line[1:] for line in words if line[:1] == ["search"]]
        domains = searches[-1] if searches else []
    chosen = _options(words, options)
    if is_named:
        servers = [NAME_SERVER]
        chosen = [option for option in chosen if not option.startswith("ndots:") or _dots(option) is not None]
        if not any(option.startswith("ndots:") for option in chosen):
            chosen.append("ndots:0")
    lines = [f"search {' '.join(domains)}"] if domains and domains != ["."] else []
    lines += [f"nameserver {server}" for server in servers or _PUBLIC_NAME_SERVERS]
    if chosen:
        lines.append(f"options {' '.join(chosen)}")
    return "".join(f"{line}\n" for line in lines)


def forwarded_to(node: str, name_servers: Sequence[str]) -> Sequence[str]:
    """Return the servers to which 127.0.0.11 forwards from the node's namespace.

    They are the servers that the user set.  Without any, they are the node's own servers, including those on its
    loopback.
    """
    return tuple(name_servers) or tuple(
        line[1] for line in _words(node) if len(line) > 1 and line[0] == "nameserver" and _is_address(line[1])
    )


def sets_ndots(node: str, options: Sequence[str]) -> bool:
    """Return whether ``ndots`` is set, so that clients append search domains to names with few dots.

    Such names are then not looked up elsewhere.  Source: moby, libnetwork/resolver.go (NdotsSet).
    """
    return any((_dots(option) or 0) > 0 for option in _options(_words(node), options))


def _words(node: str) -> list[list[str]]:
    return [line.split() for line in node.splitlines() if line[:1] not in ("#", ";")]


def _options(words: list[list[str]], options: Sequence[str]) -> list[str]:
    return list(options) or [option for line in words if line[:1] == ["options"] for option in line[1:]]


def _dots(option: str) -> int | None:
    """Return the number of an ``ndots:N`` option, or None for another option."""
    name, _, value = option.partition(":")
    return int(value) if name == "ndots" and value.isascii() and value.isdecimal() else None


def _is_address(server: str) -> bool:
    try:
        ipaddress.ip_address(server.partition("%")[0])
    except ValueError:
        return False
    return True


def _is_loopback(server: str) -> bool:
    try:
        return ipaddress.ip_address(server.partition("%")[0]).is_loopback
    except ValueError:
        return True  # not an address: no container can use it

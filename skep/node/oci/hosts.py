"""The name files of a container: /etc/hosts and /etc/resolv.conf."""

import ipaddress
from collections.abc import Iterable, Sequence

_LOCAL = """\
127.0.0.1\tlocalhost
::1\tlocalhost ip6-localhost ip6-loopback
fe00::0\tip6-localnet
ff00::0\tip6-mcastprefix
ff02::1\tip6-allnodes
ff02::2\tip6-allrouters
"""
_PUBLIC_NAME_SERVERS = ("8.8.8.8", "8.8.4.4")
"""Docker's choice where the node's own resolver cannot be reached from a container."""


def hosts_file(hostname: str, addresses: Iterable[str], extra: Iterable[str]) -> str:
    """/etc/hosts with the container's own ``addresses``.

    ``extra``: lines of ``address name...``, as a service carries them.
    """
    lines = []
    for line in extra:
        words = line.split()
        if len(words) >= 2:
            lines.append("\t".join((words[0], " ".join(words[1:]))))
    lines += [f"{address}\t{hostname}" for address in addresses]
    return _LOCAL + "".join(f"{line}\n" for line in lines)


def resolver_file(
    node: str, name_servers: Sequence[str], search_domains: Sequence[str], options: Sequence[str]
) -> str:
    """/etc/resolv.conf: the node's, with what the user says instead.

    Name servers on the node's loopback are left out: in the container's namespace nobody listens there.
    Source: moby, libnetwork/resolvconf.
    """
    words = [line.split() for line in node.splitlines() if line[:1] not in ("#", ";")]
    servers = list(name_servers) or [
        line[1] for line in words if len(line) > 1 and line[0] == "nameserver" and not _is_loopback(line[1])
    ]
    domains = list(search_domains)
    if not domains:
        searches = [line[1:] for line in words if line[:1] == ["search"]]
        domains = searches[-1] if searches else []
    chosen = list(options)
    if not chosen:
        chosen = [option for line in words if line[:1] == ["options"] for option in line[1:]]
    lines = [f"search {' '.join(domains)}"] if domains and domains != ["."] else []
    lines += [f"nameserver {server}" for server in servers or _PUBLIC_NAME_SERVERS]
    if chosen:
        lines.append(f"options {' '.join(chosen)}")
    return "".join(f"{line}\n" for line in lines)


def _is_loopback(server: str) -> bool:
    try:
        return ipaddress.ip_address(server.partition("%")[0]).is_loopback
    except ValueError:
        return True  # not an address: of no use to anyone

"""The nftables table that redirects a container's queries to the net process's sockets.

The sockets are in the container's namespace.  They use free ports instead of port 53, because the container may run its
own name server.
"""

from skep.dataplane.netns.nft_table import NftTable

NAME = "skep_names"
ADDRESS = "127.0.0.11"


def names_table(udp_port: int, tcp_port: int) -> NftTable:
    """Return the table.

    It also blocks packets from outside to loopback addresses, which ``route_localnet`` would allow.
    """
    return NftTable(
        name=f"ip {NAME}",
        chains=(
            ("raw", "{ type filter hook prerouting priority -300; }"),
            ("out", "{ type nat hook output priority -100; }"),
        ),
        rules=(
            ("raw", 'iifname != "lo" ip daddr 127.0.0.0/8 drop'),
            ("out", f"ip daddr {ADDRESS} udp dport 53 dnat to {ADDRESS}:{udp_port}"),
            ("out", f"ip daddr {ADDRESS} tcp dport 53 dnat to {ADDRESS}:{tcp_port}"),
        ),
    )

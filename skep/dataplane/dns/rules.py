"""The nftables rules that lead a container's questions to the net process's sockets: text only.

The sockets are bound in the container's namespace to ports that were free, not to 53, where the container may run a
name server of its own.
"""

NAME = "skep_names"
TABLE = f"ip {NAME}"
ADDRESS = "127.0.0.11"


def whole(udp_port: int, tcp_port: int) -> str:
    """The table as it is to be, whatever it was, as one transaction."""
    return f"add table {TABLE}\ndelete table {TABLE}\n{fresh(udp_port, tcp_port)}"


def fresh(udp_port: int, tcp_port: int) -> str:
    """The table where there is none; refused where there is one.

    Nobody outside gets at the container's loopback addresses, whatever ``route_localnet`` says.
    """
    return f"""\
create table {TABLE}
add chain {TABLE} raw {{ type filter hook prerouting priority -300; }}
add rule {TABLE} raw iifname != "lo" ip daddr 127.0.0.0/8 drop
add chain {TABLE} out {{ type nat hook output priority -100; }}
add rule {TABLE} out ip daddr {ADDRESS} udp dport 53 dnat to {ADDRESS}:{udp_port}
add rule {TABLE} out ip daddr {ADDRESS} tcp dport 53 dnat to {ADDRESS}:{tcp_port}
"""

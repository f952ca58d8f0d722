"""What other firewalls of a machine say of forwarding."""

from skep.dataplane.ingress.mesh import forwarding_tables, obstacles

UFW = """table ip filter {
\tchain FORWARD {
\t\ttype filter hook forward priority filter; policy drop;
\t\tcounter packets 4 bytes 240 jump ufw-before-forward
\t}

\tchain ufw-before-forward {
\t\tct state established,related accept
\t}
}
"""
FIREWALLD = """table inet firewalld {
\tchain filter_FORWARD {
\t\ttype filter hook forward priority filter + 10; policy accept;
\t\tct state { established, related } accept
\t\treject with icmpx admin-prohibited
\t}
}
"""
DOCKER = """table ip filter {
\tchain FORWARD {
\t\ttype filter hook forward priority filter; policy accept;
\t\toifname "docker0" drop
\t}
}
"""
OURS = """table ip skep_ingress {
\tchain forward {
\t\ttype filter hook forward priority filter; policy accept;
\t\toifname "skep-ingress" drop
\t}
}
"""


def test_others_tables_with_a_say_in_forwarding_are_found() -> None:
    assert forwarding_tables(UFW + OURS + FIREWALLD) == ("ip filter", "inet firewalld")
    assert forwarding_tables("table ip nat {\n\tchain X {\n\t}\n}\n") == ()


def test_a_policy_and_a_last_rule_forbid() -> None:
    ufw, firewalld = obstacles([UFW, FIREWALLD], ["skep-ingress", "skep-gw"])
    assert ufw == (
        "chain FORWARD of nftables table ip filter forbids forwarding: published ports lead nowhere until it accepts "
        "packets to and from skep-ingress and skep-gw"
    )
    assert firewalld.startswith("chain filter_FORWARD of nftables table inet firewalld forbids forwarding")


def test_rules_for_other_ports_or_with_an_exception_are_no_obstacle() -> None:
    assert obstacles([DOCKER, OURS], ["skep-ingress"]) == ()
    excepted = UFW.replace("ct state", 'oifname "skep-ingress" accept\n\t\tct state')
    assert obstacles([excepted], ["skep-ingress"]) == ()

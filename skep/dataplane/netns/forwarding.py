"""Whether the present network namespace leads others' packets by IPv6, and that it does.  Blocks."""

from contextlib import suppress
from pathlib import Path

from skep.dataplane.netns import nft

_IPV6 = Path("/proc/sys/net/ipv6/conf")
_PROBE = """
add table ip6 skep_probe
add chain ip6 skep_probe post { type nat hook postrouting priority 100; }
add rule ip6 skep_probe post masquerade
delete table ip6 skep_probe
"""
"""One transaction: nothing of it is ever in force."""


def ipv6_refusal() -> str:
    """Why containers cannot be led out by IPv6 here; empty: they can."""
    try:
        if (_IPV6 / "all/disable_ipv6").read_text().strip() != "0":
            return "net.ipv6.conf.all.disable_ipv6 is set"
    except OSError:
        return "the kernel has no IPv6"
    try:
        return ipv6_nat_refusal()
    except (nft.NftUnavailable, OSError) as error:
        return _no_nat(error)


def ipv6_nat_refusal() -> str:
    """Why the kernel takes no address translation for IPv6; empty: it does.

    Raises: NftUnavailable, OSError: that is not known.
    """
    try:
        nft.run(_PROBE)
    except nft.NftUnavailable:
        raise
    except nft.NftFailed as error:
        return _no_nat(error)
    return ""


def _no_nat(error: Exception) -> str:
    return f"no address translation for IPv6: {str(error).partition(chr(10))[0]}"


def forward_ipv6(settings: Path = _IPV6) -> None:
    """Let packets of others pass.  ``settings``: where the kernel shows them.

    A router takes no default route from other routers, unless ``accept_ra`` is 2.  That is set first: such routes are
    dropped in the moment in which it becomes a router.
    """
    for setting in settings.glob("*/accept_ra"):
        with suppress(OSError):  # a device that goes at this moment: a container's, perhaps
            if setting.read_text().strip() == "1":
                setting.write_text("2")
    with suppress(FileNotFoundError):
        (settings / "all/forwarding").write_text("1")

"""Detects whether this network namespace can route and translate IPv6, and enables forwarding.  Blocks."""

from contextlib import suppress
from pathlib import Path

from skep.dataplane.netns.kernel import nft

_IPV6 = Path("/proc/sys/net/ipv6/conf")
_PROBE = """
add table ip6 skep_probe
add chain ip6 skep_probe post { type nat hook postrouting priority 100; }
add rule ip6 skep_probe post masquerade
delete table ip6 skep_probe
"""
"""A test in one transaction that creates and removes a table, so that it never takes effect."""


def ipv6_refusal() -> str:
    """Return why containers cannot have IPv6 egress here, or an empty text if they can."""
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
    """Return why the kernel does not translate IPv6 addresses, or an empty text if it does.

    Raises: NftUnavailable, OSError: that could not be determined.
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
    """Enable forwarding of IPv6 packets.  ``settings`` is the kernel's folder.

    A router accepts no default route from other routers unless ``accept_ra`` is 2.  So ``accept_ra`` is set first,
    because the kernel drops such routes at the moment when forwarding is enabled.
    """
    for setting in settings.glob("*/accept_ra"):
        with suppress(OSError):  # the device, perhaps a container's, was just removed
            if setting.read_text().strip() == "1":
                setting.write_text("2")
    with suppress(FileNotFoundError):
        (settings / "all/forwarding").write_text("1")

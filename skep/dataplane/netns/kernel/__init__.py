"""The kernel's networking interfaces: netlink, nftables, connection tracking, namespaces."""

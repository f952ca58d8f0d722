"""Kernel objects of one network namespace: namespaces, links, nftables, connection tracking, neighbours."""

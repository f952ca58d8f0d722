"""The data plane of one node: links, routes, nftables rules, container names, and the net process."""

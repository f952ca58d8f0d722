"""The networks of one node: links, routes, nftables, names and the sockets of containers: a process of their own."""

"""Commands about nodes, networks, volumes, users and the cluster itself."""

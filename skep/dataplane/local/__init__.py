"""The node's own networks: predefined networks, the gateway bridge, users' networks, and ``--config-only`` networks."""

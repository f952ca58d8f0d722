"""The node's own networks: the predefined ones, the gateway bridge, users' networks, and configurations for others."""

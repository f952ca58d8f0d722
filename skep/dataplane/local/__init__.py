"""The node's own networks: those that every node has, its gateway bridge, and configurations for others."""

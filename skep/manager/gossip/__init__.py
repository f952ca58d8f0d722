"""Gossip support for Docker nodes: their keys, and a relay at every manager's port 7946."""

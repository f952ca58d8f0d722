"""Cluster volumes: the leader calls drivers to create, publish and delete them."""

"""Encrypted overlay networks: VXLAN inside WireGuard between the nodes."""

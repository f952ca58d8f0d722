"""Failover addresses on the interfaces of this machine."""

"""Failover addresses: which node holds each of them."""

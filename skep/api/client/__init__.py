"""Clients of the Engine API."""

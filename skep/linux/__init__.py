"""Wrappers of the operating system for all parts; no domain knowledge."""

"""Wrappers of the operating system for all parts; nothing of clusters."""

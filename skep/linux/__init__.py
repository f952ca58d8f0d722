"""Wrappers of operating system features, independent of clusters."""

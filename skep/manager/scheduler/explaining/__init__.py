"""Explains why a task has no node, and where a service would run."""

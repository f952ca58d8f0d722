"""Staged updates: their steps, and the share of connections of the new tasks.  Pure."""

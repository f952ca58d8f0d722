"""Volumes, mounts, and the files in containers."""

"""Compose files: reading, merging, interpolation, and conversion into a stack."""

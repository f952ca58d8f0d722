"""Formats of the Engine API: bodies, filters and times, decoded with Go's rules and checked."""

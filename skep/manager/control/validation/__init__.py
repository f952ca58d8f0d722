"""Validation of specs and names, with SwarmKit's texts."""

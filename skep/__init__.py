"""Skep: a container orchestrator with Docker's API."""

__version__ = "0.1.0"
__commit__ = ""
"""Set when a package is built. Empty in a checkout, which asks git."""
__date__ = ""
"""Date of the commit, as ``2026-11-26``."""

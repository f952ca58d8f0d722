"""Skep: a container orchestrator with Docker's API."""

__version__ = "0.1.0"

"""Skep measured beside real Docker Swarm; see README.md."""

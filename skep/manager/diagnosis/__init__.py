"""Reasons why a task or a service is not in its desired state, as sentences."""

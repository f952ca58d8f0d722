"""Scheduled jobs: the leader starts their runs when they are due."""

"""Priorities of services, and the tasks that are stopped for more important ones."""

"""Assigns pending tasks to nodes: filters, placement preferences, node accounting."""

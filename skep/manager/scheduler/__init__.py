"""Pending tasks -> nodes: filters, preferences, node accounting."""

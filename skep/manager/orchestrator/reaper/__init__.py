"""Removal of tasks beyond the history limit, and of removed services without tasks."""

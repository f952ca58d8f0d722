"""Removes tasks beyond the history limit, and services whose last task is gone."""

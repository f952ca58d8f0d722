"""Removes tasks that nobody needs for history any more, and services whose last task is gone."""

"""Reports of nodes about themselves, and their refusals of tasks."""

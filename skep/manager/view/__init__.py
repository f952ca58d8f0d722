"""The cluster as the dashboard shows it: one snapshot and differences, for all viewers of a manager."""

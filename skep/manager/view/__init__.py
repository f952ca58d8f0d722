"""The cluster's rows for the dashboard: one snapshot and differences, for all viewers of a manager."""

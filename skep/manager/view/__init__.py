"""The rows of the cluster for the dashboard.  All viewers of a manager share one snapshot and its differences."""

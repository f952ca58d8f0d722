"""The node's metrics, load, and the usage of its tasks."""

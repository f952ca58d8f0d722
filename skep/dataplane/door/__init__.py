"""The front door on a node: the configuration of its HAProxy, and the changes while it runs."""

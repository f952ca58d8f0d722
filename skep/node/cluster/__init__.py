"""This node's membership of a cluster: init, join, leave, and the manager process."""

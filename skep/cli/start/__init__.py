"""Commands that start a cluster, and the endpoints that commands connect to."""

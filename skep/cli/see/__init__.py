"""Commands that show the state of the cluster, and what happened in it."""

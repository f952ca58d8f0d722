"""The cluster's hand on a node: the session with a manager, the assigned tasks, and the executors that run them."""

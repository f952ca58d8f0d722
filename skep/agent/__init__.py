"""The node's side of the cluster: the session with a manager, assigned tasks, and the executors that run them."""

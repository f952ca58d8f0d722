"""Resource usage of containers, and the processes in them."""

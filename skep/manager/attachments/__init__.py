"""Plain containers of docker nodes on attachable networks of the cluster."""

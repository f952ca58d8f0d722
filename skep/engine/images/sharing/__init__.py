"""Images that the nodes of a cluster fetch from each other."""

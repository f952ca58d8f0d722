"""The services of the cluster's certificate authority: who becomes a node."""

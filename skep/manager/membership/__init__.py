"""The managers of the cluster: joining as a manager, roles, the quorum, and the managers' addresses."""

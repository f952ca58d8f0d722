"""Queries of the leader over HTTP, for autoscaling and canaries (``model.measures.queries``)."""

"""Simulated lives of containers on one node: the production engine on a simulated runtime, network and disk."""

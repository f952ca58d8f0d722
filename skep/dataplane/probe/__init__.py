"""Probes between nodes: what the data path lets through, measured where containers' packets go."""

"""Probes between nodes: measures which packets the data path delivers, on the path that containers' packets take."""

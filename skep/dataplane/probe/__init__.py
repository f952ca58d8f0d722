"""Probes between nodes: measures which packets arrive on the path that containers' packets take."""

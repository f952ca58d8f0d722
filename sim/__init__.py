"""Simulated clusters on virtual time: production control loops on a simulated store and nodes, faults, invariants."""

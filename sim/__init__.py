"""Whole clusters on virtual time: the real control loops on a store in memory, simulated nodes, faults, invariants."""

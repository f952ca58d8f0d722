"""Checks the invariants of the stored state: the same rules on a live cluster and in the simulation."""

"""Simulation of the store only: managers that consist of their store, users of keys, and faults."""

"""Simulation of only the store: managers that consist of their store, users of keys, and faults."""

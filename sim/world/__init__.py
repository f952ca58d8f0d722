"""The simulated world: time, network, machines, managers, nodes and storage."""

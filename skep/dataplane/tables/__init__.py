"""Network tables on a node: what the managers say of its networks, kept over restarts, handed to what acts on it."""

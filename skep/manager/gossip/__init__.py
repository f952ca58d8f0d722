"""What docker nodes need to gossip among themselves: the keys, and somebody at every manager's port 7946."""

"""What docker nodes need to gossip among themselves: the keys, and a relay at every manager's port 7946."""

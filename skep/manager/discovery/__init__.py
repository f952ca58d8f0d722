"""Network tables.  Every manager derives them from the store, and streams them to the skep nodes that need them."""

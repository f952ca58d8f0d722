"""The store alone: managers that are nothing but their store, users of keys, and what breaks."""

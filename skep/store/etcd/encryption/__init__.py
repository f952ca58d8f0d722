"""Encryption of the stored values, and the rotation of its key."""

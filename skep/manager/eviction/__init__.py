"""Eviction of a node that is no longer trusted: removes it and replaces every key that it had."""

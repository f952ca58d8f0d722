"""Eviction of an untrusted node: removes it and replaces every key that it had."""

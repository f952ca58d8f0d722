"""Shared parts of all control loops: the informer, the work queue, error handling per object."""

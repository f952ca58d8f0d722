"""Validated operations on the cluster, one module per object.

An operation is a transaction function: it checks, writes, and returns what it made.  ``store.update`` runs it,
again after a conflict, so it has no side effects; ids, names and time come in as arguments.
What it raises is worded like SwarmKit's control API; the routes put gRPC's prefix before it.
"""

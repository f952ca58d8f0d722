"""Validated operations on the cluster, one module per object.

An operation is a transaction function: it checks, writes, and returns the object that it created or changed.
``store.update`` runs it, and repeats it after a conflict, so it has no side effects.  Ids, names and time are
arguments.  Its errors are worded like SwarmKit's control API, and the routes add gRPC's prefix.
"""

"""Invariants that must hold in every run.

Rules on commits are functions ``(change, view) -> violations``.  Rules with state are callable classes.  ``Observer``
evaluates all of them at every commit, and rules on containers when a machine starts or stops one.
"""

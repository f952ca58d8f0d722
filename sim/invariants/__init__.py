"""What must hold in every run, written once and watched all the time.

Rules on commits are functions ``(change, view) -> violations``; those that need a memory are classes with such a
call.  ``Observer`` asks all of them at every commit; rules on containers are asked by the machines.
"""

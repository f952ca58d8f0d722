"""Processes that outlive the node process: forks, finds, replaces and restarts them.

``zygote`` forks them from a process that has done the imports, ``restart`` decides when to retry, and ``supervisor``
acts.  The first steps of such a process and its identification beyond its pid are in ``linux.detached``.
"""

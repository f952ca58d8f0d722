"""Processes that outlive the node process: how they are forked, found again, replaced and kept running.

``zygote`` forks them from a process that has the imports done, ``identity`` names a process beyond its pid,
``detached`` is what such a process does first, ``restart`` decides when to try again, ``supervisor`` acts.
"""

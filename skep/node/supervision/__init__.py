"""Processes that outlive the node process: how they are forked, found again, replaced and kept running.

``zygote`` forks them from a process that has the imports done, ``restart`` decides when to try again, ``supervisor``
acts.  What such a process does first, and how it is named beyond its pid, is in ``linux.detached``.
"""

"""Processes that outlive the node process: forks, finds, replaces and restarts them.

``zygote`` forks them from a process that has already imported all modules, ``restart`` decides when to retry, and
``supervisor`` carries that out.  ``linux.detached`` identifies such processes.
"""

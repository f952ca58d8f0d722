"""The event loop of a process: its lag, hangs, garbage collection, and child processes."""

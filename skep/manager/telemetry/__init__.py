"""Metrics, traces and events of a manager, and the watchdog of its event loop."""

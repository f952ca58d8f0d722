"""Measures beyond CPU and memory: queries with their answers, and requests at front doors.  Pure."""

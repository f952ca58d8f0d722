"""Moves running tasks to other nodes until they are evenly spread.  Leader only, except for the plan."""

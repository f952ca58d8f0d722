"""Faults, and what a cluster must do after them."""

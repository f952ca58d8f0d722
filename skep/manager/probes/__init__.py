"""Reachability between nodes: chooses the targets of probes, stores results, and chooses the nodes that placement
avoids.
"""

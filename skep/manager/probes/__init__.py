"""Reachability between nodes: targets of probes, their stored results, and the nodes that placement avoids."""

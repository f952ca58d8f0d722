"""Autoscaling: service replicas that follow the CPU and memory usage of their tasks."""

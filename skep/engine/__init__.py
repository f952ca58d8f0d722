"""Containers under runc and conmon: bundles, cgroups, logs, exec, images."""

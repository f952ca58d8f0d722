"""Compose files as stacks: read, merged, checked, converted into the objects of a cluster, compared and deployed.

``document`` reads YAML and keeps positions, ``interpolation`` fills in variables, ``loading`` joins files,
``conversion`` makes specs of services, ``planning`` compares them with what a cluster has, ``deploying`` carries the
plan out.  All but the first step of ``loading`` and ``deploying`` are pure.
"""

"""Deploys stacks: reads, merges and checks Compose files, converts them into cluster objects, and applies the
differences.

``document`` reads YAML and keeps positions, ``interpolation`` fills in variables, ``loading`` joins files,
``conversion`` makes service specs, ``planning`` compares them with the cluster's objects, and ``deploying`` applies the
plan.  All steps are pure, except that ``loading`` reads files and ``deploying`` calls the cluster.
"""

"""Stacks: Compose files are read, merged, checked, converted into cluster objects, compared and deployed.

``document`` reads YAML and keeps positions, ``interpolation`` fills in variables, ``loading`` joins files,
``conversion`` makes service specs, ``planning`` compares them with the cluster's objects, ``deploying`` applies the
plan.  All but the first step of ``loading`` and ``deploying`` are pure.
"""

"""A cluster on one machine: each node in network, mount and UTS namespaces of its own.

``playground.py`` has the verbs.  Everything that is created has the playground's name in its own, so ``down`` finds it
by name alone, even after a crash halfway.
"""

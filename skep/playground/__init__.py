"""A cluster on one machine: each node in network, mount and UTS namespaces of its own.

``playground.py`` has the verbs.  Everything that is made carries the playground's name, so ``down`` finds it
again by name alone, also after a crash half-way.
"""

"""A test cluster on one machine.  Each node has separate network, mount and UTS namespaces.

``playground.py`` has the verbs.  The name of everything that is created contains the playground's name, so ``down``
finds it all by name, even after a crash.
"""

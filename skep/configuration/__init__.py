"""Configuration of the node: flags, ``/etc/skep/skep.toml`` and Docker's ``daemon.json``.

``settings`` lists every setting once, ``values`` turns what was written into typed values, ``sources`` reads the
three sources and merges them, ``reload`` decides what a running node takes over.
"""

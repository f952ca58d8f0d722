"""Configuration of the node: flags, ``/etc/skep/skep.toml`` and Docker's ``daemon.json``.

``settings`` lists every setting once, ``values`` parses written values, ``sources`` reads and merges the three sources,
``reload`` decides which changes a running node applies.
"""

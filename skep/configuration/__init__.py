"""What the node is told: flags, ``/etc/skep/skep.toml`` and Docker's ``daemon.json``.

``settings`` lists every setting once, ``values`` turns what was written into typed values, ``sources`` reads the
three places and lays them over each other, ``reload`` says what a running node takes over.
"""

"""The net process: holds what must survive the node process; so far: the reserved host ports.

``reservations`` holds them, ``handover`` passes them on, ``protocol`` is what is said over ``net.sock``, ``process``
serves it, ``client`` asks.
"""

"""Published ports that the net process relays, instead of the kernel."""

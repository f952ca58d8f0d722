"""Published ports that are relayed by the net process instead of the kernel."""

"""Published ports and connections that are relayed by a process instead of the kernel."""

"""The machine's ports and routes, from the kernel."""

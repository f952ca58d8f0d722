"""The machine's own Docker Engine."""

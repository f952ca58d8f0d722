"""The machine's Docker Engine beside Skep."""

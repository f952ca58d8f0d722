"""What every part asks of the operating system in the same way; no domain knowledge."""

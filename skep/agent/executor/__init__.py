"""Task executors: OCI containers, plain processes, simulated."""

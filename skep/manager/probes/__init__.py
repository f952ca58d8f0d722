"""Ways between nodes: who probes whom, what is written of it, and which nodes tasks keep away from."""

"""SwarmKit's protocol: messages, connections, and the only conversions between them and the model."""

"""SwarmKit's protocol: its messages, its connections, and the conversions between messages and the model."""

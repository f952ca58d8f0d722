"""The session with a manager: its choice, its streams, and the state that it leaves on this node."""

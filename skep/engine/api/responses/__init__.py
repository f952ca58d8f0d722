"""The engine's objects as the Engine API shows them. Pure."""

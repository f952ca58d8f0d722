"""The life of a container: a pure table (``machine``), its effects on the world, and the driver that runs it."""

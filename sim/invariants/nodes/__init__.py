"""Rules on nodes, and on what tasks hold there."""

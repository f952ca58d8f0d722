"""The choice of a node: accounting, filters, spread and ranking."""

"""The journal: requests of clients, and changes with their reasons, kept in the store within bounds (decision 98)."""

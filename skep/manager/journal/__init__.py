"""The journal: what clients asked, and what happened and why, kept in the store within bounds (decision 98)."""

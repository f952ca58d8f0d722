"""Transactions: the proposal that each becomes, and the retries until it commits."""

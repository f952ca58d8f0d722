"""The replicated object store: parts, views, transactions, watches, leadership."""

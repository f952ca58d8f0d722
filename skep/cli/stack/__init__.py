"""``skep stack``: commands about Compose stacks."""

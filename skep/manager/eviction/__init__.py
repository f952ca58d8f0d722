"""Takes back what a node knows that is not trusted any more: its place, and every key that it had."""

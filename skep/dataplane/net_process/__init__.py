"""The net process, which serves names and virtual addresses and outlives the node process."""

"""The network tables of a node: received from managers, validated, saved for restarts, and applied by listeners."""

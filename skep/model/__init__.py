"""The Engine API's objects, ids and states; no I/O."""

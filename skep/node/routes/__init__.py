"""The node's half of the Engine API: images, and the containers of tasks.  One module per resource."""

"""Pure planners: from network tables and local endpoints to the wanted state of a namespace (``netns.state``)."""

"""Pure planners: from network tables and local endpoints to the desired state of a namespace (``netns.state``)."""

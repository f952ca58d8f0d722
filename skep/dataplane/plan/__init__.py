"""Pure functions that plan the desired state of a namespace (``netns.state``) from network tables and local
endpoints.
"""

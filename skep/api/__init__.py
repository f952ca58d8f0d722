"""The HTTP API's two ends: ``server`` (applications with the conventions of Docker's API) and ``client``."""

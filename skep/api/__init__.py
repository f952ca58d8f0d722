"""The HTTP API's two ends: ``server`` (applications that speak Docker's dialect) and ``client``."""

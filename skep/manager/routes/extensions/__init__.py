"""Routes that Docker does not have, below ``/skep``."""

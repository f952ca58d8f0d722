"""Building images: Dockerfiles are read here and carried out with the engine's own containers and image store."""

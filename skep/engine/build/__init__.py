"""Image builds: parses Dockerfiles and runs them with the engine's own containers and image store."""

"""Plain containers: what ``docker run`` makes where Skep runs containers itself."""

"""The HTTP edge of the Engine API: connections, requests, responses, and their passing between processes."""

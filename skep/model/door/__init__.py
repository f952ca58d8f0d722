"""The front door: HTTP routes of services, and the service that serves them."""

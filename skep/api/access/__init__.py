"""Access to the API: who sent a request, the roles that it needs, and the refusals."""

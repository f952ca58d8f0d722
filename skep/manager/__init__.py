"""One manager: the API's swarm half, the dispatcher and the CA always; the control loops while it leads."""

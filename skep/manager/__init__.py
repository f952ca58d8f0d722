"""One manager.  The swarm half of the API, the dispatcher and the CA always run, the control loops while it leads."""

"""Who manages: coming in as a manager, roles, the quorum, and where managers find each other."""

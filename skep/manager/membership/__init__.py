"""Membership of managers: joining, changes of roles, the quorum, and the managers' addresses."""

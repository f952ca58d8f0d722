"""Users, roles, and the rights that specs ask for."""

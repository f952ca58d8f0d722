"""Simulated users and operators, their requests, and Docker's responses to them."""

"""The journal keeps requests of clients, and changes with their reasons, in a bounded part of the store (decision
98).
"""

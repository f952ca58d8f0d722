"""Asyncio building blocks without anything of clusters."""

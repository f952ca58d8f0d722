"""Responses of the engine that are streams: hijacked connections, WebSockets, progress."""

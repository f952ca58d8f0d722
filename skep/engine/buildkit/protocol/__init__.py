"""The protocols of BuildKit's clients: gRPC on hijacked connections, sessions, file transfer."""

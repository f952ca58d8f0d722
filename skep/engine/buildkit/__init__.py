"""BuildKit's protocols, as the docker command, buildx and compose use them to build images.

A client opens a *session*: a connection on which the engine calls the client, for files, secrets, credentials and its
ssh agent.  The build is asked for by ``POST /build`` (docker 20.10) or by calls of a second connection (buildx), and is
carried out by ``skep.engine.build``.  Reasons: ``docs/decisions/0058-buildkits-protocol.md``.
"""

"""BuildKit's protocols, as the docker command, buildx and compose use them to build images.

A client opens a *session*: a connection on which the engine calls the client for files, secrets, credentials and its
ssh agent.  ``POST /build`` (docker 20.10) or calls on a second connection (buildx) start the build, which
``skep.engine.build`` runs.  Reasons: ``docs/decisions/0058-buildkit-protocols-served-skep-builder.md``.
"""

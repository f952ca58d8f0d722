#!/bin/bash
# Renews the lock files from pyproject.toml (make lock).  No index is named in them:
# whoever installs uses the index that their machine is configured for.
set -euo pipefail
cd "$(dirname "$0")/.."
compile=(.venv/bin/pip-compile --quiet --generate-hashes --allow-unsafe --strip-extras --no-header
    --no-emit-index-url --no-emit-trusted-host --no-emit-find-links --build-deps-for=editable)
"${compile[@]}" "$@" --output-file setup/requirements.lock pyproject.toml
"${compile[@]}" "$@" --extra dev --constraint setup/requirements.lock --output-file setup/requirements-dev.lock pyproject.toml

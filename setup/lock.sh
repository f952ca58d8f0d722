#!/bin/bash
# Updates the lock files from pyproject.toml (make lock).  They name no package index, so that
# each machine uses the index that it is configured for.
set -euo pipefail
cd "$(dirname "$0")/.."
compile=(.venv/bin/pip-compile --quiet --generate-hashes --allow-unsafe --strip-extras --no-header
    --no-emit-index-url --no-emit-trusted-host --no-emit-find-links --build-deps-for=editable)
"${compile[@]}" "$@" --extra server --output-file setup/requirements.lock pyproject.toml
"${compile[@]}" "$@" --extra server --extra dev --constraint setup/requirements.lock --output-file setup/requirements-dev.lock \
    pyproject.toml

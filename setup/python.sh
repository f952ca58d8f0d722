#!/bin/bash
# Creates or repairs the virtual environment: python.sh PYTHON VENV run|dev
#
# Every file that pip fetches is checked against the hashes of a lock file.  Skep itself is
# installed editable from this checkout, without network access.
set -euo pipefail
cd "$(dirname "$0")"
. ./say.sh

python=$1
venv=$2
extent=$3

lock=requirements.lock
[ "$extent" = dev ] && lock=requirements-dev.lock
# The path is part of the key, because a moved environment has the old path in its scripts.
key="$venv $("$python" -c 'import sys; print(sys.version)') $(digest "$lock" ../pyproject.toml python.sh)"
stamp=$venv/.setup-$extent
works() { "$venv/bin/python" -c 'import pip, skep' 2>/dev/null; }

if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$key" ] && works; then
    exit 0
fi
# A dev environment is also a complete run environment.
if [ "$extent" = run ] && [ -f "$venv/.setup-dev" ] && works; then
    bash python.sh "$python" "$venv" dev
    exit 0
fi

if ! "$venv/bin/python" -c 'import pip' 2>/dev/null; then
    say "creating the virtual environment $venv"
    # Not `venv --clear`, which would also remove the unpacked programs in libexec.
    rm -rf "$venv"/{bin,include,lib,lib64,pyvenv.cfg}
    "$python" -m venv "$venv" || fail "the virtual environment could not be made (above)" \
        "remove $venv and run make again"
fi
say "installing the locked Python packages ($lock)"
pip=("$venv/bin/python" -m pip --disable-pip-version-check --quiet)
"${pip[@]}" install --require-hashes --no-deps --requirement "$lock" </dev/null || fail "pip failed (above)" \
    "check the machine's way to its Python package index, then run make again"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
"${pip[@]}" install --no-index --no-build-isolation --no-deps --editable .. </dev/null >"$log" 2>&1 || cat "$log" >&2
works || fail "the virtual environment does not work after its installation" "remove $venv and run make again"
printf '%s' "$key" >"$stamp"

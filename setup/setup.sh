#!/bin/bash
# Sets up everything: setup.sh run|dev.  Every step does only missing work, so a second run is quick.
#   run  requirements of Skep and its demo        dev  also the tests and their tools
# PYTHON selects the interpreter, which must be 3.11 or newer.
set -euo pipefail
cd "$(dirname "$0")"
. ./say.sh

extent=${1:-dev}
venv=$(cd .. && pwd)/.venv

[ "$(uname -s)" = Linux ] || fail "Skep runs on Linux only, this is $(uname -s)" "use a Linux machine or a virtual one"

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }
python=
for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
    if command -v "$candidate" >/dev/null && new_enough "$candidate"; then
        python=$(command -v "$candidate")
        break
    fi
done
if [ -z "$python" ]; then
    fail "Python 3.11 or newer is needed; found: $(${PYTHON:-python3} --version 2>&1 || true)" \
        "Debian 12 or newer, Ubuntu 24.04 or newer: apt-get install python3 python3-venv" \
        "elsewhere: install one and name it, make PYTHON=/path/to/python3.11"
fi

./packages.sh "$python" "$venv/libexec/skep" "$extent"
./python.sh "$python" "$venv" "$extent"
[ "$extent" != dev ] || (cd .. && "$venv/bin/python" -m skep.protobuf.compile --stubs)
./etcd.sh "$venv/libexec/skep"
[ "$extent" != dev ] || ./plugins.sh "$venv/libexec/skep"
[ "$extent" != dev ] || ./browser.sh "$venv/libexec/skep"
# Link a docker command that was only unpacked into the environment, like its other commands.
if [ -x "$venv/libexec/skep/docker" ]; then
    ln -sf ../libexec/skep/docker "$venv/bin/docker"
fi

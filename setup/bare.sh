#!/bin/bash
# The README's two commands on bare machines: bare.sh SUITE [COMMAND...]
# Makes a system of that suite (bookworm, trixie, noble) with nothing in it but Python, make and git, puts a fresh
# clone of the present commit there, and runs COMMAND in it (default: make demo, make demo-down, make test).
# A chroot with mounts and processes of its own stands for the machine; kernel and network are this one's.
# Needs root and debootstrap.  The last line says how it ended; everything it made is removed.
set -euo pipefail
cd "$(dirname "$0")/.."
. setup/say.sh
. setup/suite.sh
. setup/machine.sh

suite=${1:?which suite?}
shift
[ $# -gt 0 ] || set -- "make demo" "make demo-down" "make test"
[ "$(id -u)" = 0 ] || fail "this needs root" "run it as root"

place=$(mktemp -d /var/tmp/skep-bare-XXXXXX)
trap 'rm -rf --one-file-system "$place"' EXIT
say "$suite: a bare machine, commit $(git rev-parse --short HEAD)"
make_machine "$suite" "$place/machine"

for command in "$@"; do
    say "$suite: $command"
    began=$SECONDS
    run_inside "$place/machine" "$command" </dev/null || fail "$suite: $command failed after $((SECONDS - began)) s"
    say "$suite: $command worked, $((SECONDS - began)) s"
done
say "$suite: all of it worked: $*"

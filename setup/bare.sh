#!/bin/bash
# Tests the README's commands on a bare machine: bare.sh SUITE [COMMAND...]
# Creates a system of that suite (bookworm, trixie, noble, resolute) with only Python, make and git, adds a fresh clone of the
# current commit, and runs COMMAND in it (default: make demo, make demo-down, make test).
# A chroot with its own mounts and processes stands for the machine. It shares this machine's kernel and network.
# ARCH=arm64 makes a machine of another processor, which qemu's user emulation runs.
# Needs root and debootstrap.  The last line says how it ended.  All created files are removed.
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
trap 'stop_emulation; rm -rf --one-file-system "$place"' EXIT
[ "${ARCH:-$(dpkg --print-architecture)}" = "$(dpkg --print-architecture)" ] || emulate "$ARCH" "$place/emulator"
say "$suite: a bare machine, commit $(git rev-parse --short HEAD)"
make_machine "$suite" "$place/machine"

for command in "$@"; do
    say "$suite: $command"
    began=$SECONDS
    run_inside "$place/machine" "$command" </dev/null || fail "$suite: $command failed after $((SECONDS - began)) s"
    say "$suite: $command worked, $((SECONDS - began)) s"
done
say "$suite: all of it worked: $*"

#!/bin/bash
# The README's two commands on bare machines: bare.sh SUITE [COMMAND...]
# Makes a system of that suite of Debian (bookworm, trixie, ...) with nothing in it but Python, make and git, puts a
# fresh clone of the present commit there, and runs COMMAND in it (default: make demo, make demo-down, make test).
# A chroot with mounts and processes of its own stands for the machine; kernel and network are this one's.
# Needs root and debootstrap.  The last line says how it ended; everything it made is removed.
set -euo pipefail
cd "$(dirname "$0")/.."
. setup/say.sh

suite=${1:?which suite?}
shift
[ $# -gt 0 ] || set -- "make demo" "make demo-down" "make test"
[ "$(id -u)" = 0 ] || fail "this needs root" "run it as root"
command -v debootstrap >/dev/null || fail "debootstrap is missing" "apt-get install debootstrap"

mirror=$(apt-get indextargets --format '$(SITE)|$(ORIGIN)|$(COMPONENT)' 'Created-By: Packages' |
    awk -F '|' '$2 == "Debian" && $3 == "main" { print $1; exit }')
[ -n "$mirror" ] || fail "no package mirror of Debian is configured here" "add one to /etc/apt/sources.list.d"

machine=$(mktemp -d /var/tmp/skep-bare-XXXXXX)
trap 'rm -rf --one-file-system "$machine"' EXIT
say "a bare $suite in $machine"
debootstrap --variant=minbase --include=python3,make,git,ca-certificates "$suite" "$machine" "$mirror" >"$machine.log" 2>&1 || {
    tail -5 "$machine.log" >&2
    fail "debootstrap of $suite failed (above)" "look into $machine.log"
}
rm -f "$machine.log"

# What belongs to the machine's place in its network, not to the machine.
cp -L /etc/resolv.conf "$machine/etc/resolv.conf"
cp /etc/apt/apt.conf.d/* "$machine/etc/apt/apt.conf.d/"
[ ! -e /etc/pip.conf ] || cp /etc/pip.conf "$machine/etc/pip.conf"
cp -L /etc/ssl/certs/ca-certificates.crt "$machine/etc/ssl/certs/ca-certificates.crt"
git clone -q . "$machine/root/skep"

run_inside() {
    unshare --mount --pid --fork --kill-child sh -euc '
        mount --make-rprivate /
        mount --bind "$1" "$1"
        mount --rbind /dev "$1/dev"
        mount --rbind /sys "$1/sys"
        mount -t proc proc "$1/proc"
        mount -t tmpfs tmpfs "$1/run"
        exec chroot "$1" sh -c "cd /root/skep && CI=true $2"
    ' sh "$machine" "$1"
}

for command in "$@"; do
    say "$suite: $command"
    began=$SECONDS
    run_inside "$command" </dev/null || fail "$suite: $command failed after $((SECONDS - began)) s"
    say "$suite: $command worked, $((SECONDS - began)) s"
done
say "$suite: all of it worked: $*"

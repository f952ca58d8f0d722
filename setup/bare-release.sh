#!/bin/bash
# Installs a release on a bare machine without Python, from a server on loopback: bare-release.sh DIRECTORY [SUITE]
# First the tarball, with which a container runs, then by apt.  Both are removed again.
# A chroot with its own mounts and processes stands for the machine, as for bare.sh.  The daemon has its own network.
set -euo pipefail
cd "$(dirname "$0")/.."
. setup/say.sh
. setup/suite.sh
. setup/machine.sh

release=$(realpath "${1:?which release?}")
suite=${2:-trixie}
[ "$(id -u)" = 0 ] || fail "this needs root" "run it as root"
know_suite "$suite"
place=$(mktemp -d /var/tmp/skep-bare-XXXXXX)
server=
trap '[ -z "$server" ] || kill "$server"; rm -rf --one-file-system "$place"' EXIT
machine=$place/machine

say "$suite: a bare machine without Python"
mkdir "$place/keys"
debootstrap --variant=minbase --force-check-gpg --keyring "$(keyring_of "$distribution" "$place/keys")" \
    --components "$components" "$suite" "$machine" "$(mirror_of "$distribution")" "$script" >"$place/log" 2>&1 || {
    tail -n 5 "$place/log" >&2
    fail "debootstrap of $suite failed (above)"
}
[ ! -e "$machine/usr/bin/python3" ] || fail "$suite has python3 already"
mkdir -p "$machine/etc/ssl/certs"
place_in_network "$machine"
cp "$release/install.sh" "$machine/root/"
cp setup/bare-release.py "$machine/root/"
printf '#!/bin/sh\nexit 101\n' >"$machine/usr/sbin/policy-rc.d" # there is no systemd
chmod +x "$machine/usr/sbin/policy-rc.d"
.venv/bin/python -u -m http.server --bind 127.0.0.1 --directory "$release" 0 >"$place/server" 2>/dev/null &
server=$!
until port=$(sed -n 's/.* port \([0-9]*\) .*/\1/p' "$place/server") && [ -n "$port" ]; do
    kill -0 "$server" || fail "the server has ended"
    sleep 0.1
done

inside() {
    local began=$SECONDS
    say "$suite: $1"
    run_inside "$machine" "$1" /root </dev/null || fail "$suite: $1 failed"
    say "$suite: it took $((SECONDS - began)) s"
}
install="sh install.sh --from http://127.0.0.1:$port"
inside "$install --no-apt && $install --no-apt"
inside "unshare --net /opt/skep/current/bin/python3 -I bare-release.py"
inside "$install --uninstall && test ! -e /opt/skep && ! command -v skep"
inside "apt-get -q update && $install && $install && skep --version"
inside "$install --uninstall && ! command -v skep"
say "$suite: all of it worked"

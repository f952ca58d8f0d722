#!/bin/bash
# A bare machine that boot.sh boots, with all that a Debian package of skep depends on: bootable.sh SUITE DIRECTORY PACKAGE
# The suite's base system is kept in $MACHINES (/var/cache/skep-machines) and brought up to date in the copy.
# Installs the package with the archive's, asks for its version, and purges it again: there is no systemd yet.
set -euo pipefail
cd "$(dirname "$0")/.."
. setup/say.sh
. setup/suite.sh
. setup/machine.sh

suite=$1
machine=$2
base=${MACHINES:-/var/cache/skep-machines}/$suite
if [ ! -d "$base" ]; then
    say "$suite: fetching the base system"
    mkdir -p "${base%/*}"
    rm -rf --one-file-system "$base.new"
    make_system "$suite" "$base.new"
    mv "$base.new" "$base"
fi
cp -a --reflink=auto "$base" "$machine"
place_in_network "$machine"
cp "$3" "$machine/root/skep.deb"
printf '#!/bin/sh\nexit 101\n' >"$machine/usr/sbin/policy-rc.d"
chmod +x "$machine/usr/sbin/policy-rc.d"
install="DEBIAN_FRONTEND=noninteractive apt-get -q -y install --no-install-recommends"
run_inside "$machine" "apt-get -q update && $install /root/skep.deb && skep --version &&
    DEBIAN_FRONTEND=noninteractive apt-get -q -y purge skep && $install systemd systemd-sysv dbus" /root </dev/null
rm "$machine/usr/sbin/policy-rc.d" "$machine/root/skep.deb"

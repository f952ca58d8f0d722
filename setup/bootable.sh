#!/bin/bash
# Creates a bare machine for boot.sh: bootable.sh SUITE DIRECTORY PACKAGE [FURTHER PACKAGES OF THE SUITE]
# The suite's base system is kept in $MACHINES (/var/cache/skep-machines) and updated in the copy.
# Installs skep's package with its dependencies, prints its version, and purges it again, so that the dependencies stay.
# bootable.sh --fetch-only ...: only fetches dependencies and recommendations, for an apt that cannot reach the archive.
set -euo pipefail
cd "$(dirname "$0")/.."
. setup/say.sh
. setup/suite.sh
. setup/machine.sh

is_fetched=
[ "$1" != --fetch-only ] || { is_fetched=yes && shift; }
suite=$1
machine=$2
copy_base "$suite" "$machine"
place_in_network "$machine"
cp "$3" "$machine/root/skep.deb"
printf '#!/bin/sh\nexit 101\n' >"$machine/usr/sbin/policy-rc.d"
chmod +x "$machine/usr/sbin/policy-rc.d"
apt="DEBIAN_FRONTEND=noninteractive apt-get -q -y"
install="$apt install --no-install-recommends"
# There is no systemd yet.  Fetched packages last until the next run of dpkg, so fetching comes last.
before="$install /root/skep.deb && skep --version && $apt purge skep"
after=true
[ -z "$is_fetched" ] || { before=true && after="$apt install --download-only /root/skep.deb"; }
run_inside "$machine" "apt-get -q update && $before && $install systemd systemd-sysv dbus ${*:4} && $after" /root </dev/null
rm "$machine/usr/sbin/policy-rc.d" "$machine/root/skep.deb"

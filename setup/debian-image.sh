#!/bin/bash
# Writes the file system of the image debian:SUITE for "docker import": debian-image.sh SUITE TARBALL [PACKAGE...]
# It contains the packages with their dependencies in a local archive that its apt uses, so builds on nodes without internet
# access can run apt-get.  The base system is kept in $MACHINES, as in bootable.sh.  Needs root and debootstrap.
set -euo pipefail
cd "$(dirname "$0")/.."
. setup/say.sh
. setup/suite.sh
. setup/machine.sh

suite=$1
tarball=$(realpath "$2")
place=$(mktemp -d /var/tmp/skep-debian-XXXXXX)
trap 'rm -rf --one-file-system "$place"' EXIT
copy_base "$suite" "$place/machine"
place_in_network "$place/machine"
run_inside "$place/machine" "
    apt='apt-get -q -y -o DPkg::Post-Invoke::= -o APT::Update::Post-Invoke::='
    \$apt update && \$apt clean && \$apt install --no-install-recommends apt-utils && \$apt clean
    \$apt install --no-install-recommends --download-only ${*:3}
    mkdir /packages && mv /var/cache/apt/archives/*.deb /packages && cd /packages && apt-ftparchive packages . >Packages" /root \
    </dev/null >"$place/log" 2>&1 || { tail -5 "$place/log" >&2 && fail "$suite: packages could not be fetched (above)"; }
cd "$place/machine"
rm -rf var/lib/apt/lists/* usr/share/{doc,man,locale} etc/apt/sources.list.d/* etc/resolv.conf
(cd etc/apt/apt.conf.d && comm -12 <(ls) <(ls /etc/apt/apt.conf.d) | grep -v '^docker-' | xargs -r rm -f)
echo 'deb [trusted=yes] file:/packages ./' >etc/apt/sources.list
tar --one-file-system --numeric-owner -cf "$tarball" .

#!/bin/bash
# Writes a command dockerd that runs the Docker Engine of a Debian suite: engine.sh SUITE DIRECTORY
# The engine and everything it calls are a system of that suite, kept in $MACHINES (/var/cache/skep-machines).  Its /run,
# /tmp, /var/tmp, devices, kernel and network are those of the caller, so that sockets and data are where the caller looks.
# Needs root and debootstrap.  The engine of the machine, if there is one, is not used.
set -euo pipefail
cd "$(dirname "$0")/.."
. setup/say.sh
. setup/suite.sh
. setup/machine.sh

suite=$1
directory=$2
kept_system "engine-$suite" "$suite" docker.io,iptables,procps,xz-utils,git
root=$kept
mkdir -p "$root/etc/docker"
mkdir -p "$directory"
# Its PATH is set, because this command may be the first dockerd on the caller's.
cat >"$directory/dockerd" <<END
#!/bin/sh
exec unshare --mount --propagation private sh -euc '
mount --bind "$root" "$root"
for place in dev sys proc run tmp var/tmp; do mount --rbind "/\$place" "$root/\$place"; done
cd "$root"
pivot_root . mnt
exec chroot . env PATH=/usr/sbin:/usr/bin sh -euc "umount -l /mnt; exec dockerd \"\\\$@\"" sh "\$@"
' sh "\$@"
END
chmod +x "$directory/dockerd"

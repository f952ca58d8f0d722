# What systemd is on a real machine: prepares the node's namespaces, then keeps `skep daemon` running.
#
#   holder.sh NAME DIRECTORY CGROUP-DIRECTORIES -- COMMAND...
#
# Runs under `tini -s` in fresh network, mount and UTS namespaces.  It is a shell script so that a node at
# rest costs a few hundred kilobytes for it and not a second Python.  All of /run is the node's own: it vanishes
# with the node's last process, as a reboot empties it, and shows none of the machine's sockets.
# DIRECTORY/ends gets the exit code of each daemon that ended, one per line.
set -eu

name=$1
directory=$2
agents=$3
shift 4

for agent in $agents; do
    echo $$ >"$agent/cgroup.procs"
done

# Other nodes' namespaces are pinned by mounts; a copy of such a mount would keep them alive.
while read -r _ target _; do
    case $target in
    # One that was removed since it was listed has taken its copies along.
    /run/netns/* | /var/run/netns/*) umount -l "$target" 2>/dev/null || true ;;
    esac
done </proc/mounts

# Where /etc/resolv.conf is a link into /run, its target has to survive the new /run.
resolver=$(readlink -f /etc/resolv.conf || true)
servers=$(cat /etc/resolv.conf 2>/dev/null || true)
mount -t tmpfs -o mode=755,nosuid,nodev skep-run /run
mkdir -p /run/skep /run/lock
case $resolver in
/run/*) mkdir -p "${resolver%/*}" && printf '%s\n' "$servers" >"$resolver" ;;
esac

echo "$name" >/proc/sys/kernel/hostname
ulimit -n "$(ulimit -H -n)"

stopping=
trap 'stopping=yes; kill -TERM "$daemon" 2>/dev/null || true' TERM INT
while [ -z "$stopping" ]; do
    "$@" >>"$directory/skep.log" 2>&1 </dev/null &
    daemon=$!
    code=0
    wait "$daemon" || code=$?
    # The trap interrupts `wait`: see the daemon off before leaving.
    wait "$daemon" || true
    echo "$code" >>"$directory/ends"
    # As RestartSec of the systemd unit: a daemon that cannot start does not keep a core busy.
    [ -n "$stopping" ] || sleep 0.2
done

#!/bin/bash
# Boots a machine's directory with its own systemd: boot.sh DIRECTORY NAME [ADDRESS].  Runs until the machine ends.  Send
# SIGKILL to its first process to end it.
# The machine shares only the kernel.  It has its own mounts, processes, host name, network (one address, not connected to
# the outside), and a part of each cgroup hierarchy, called NAME.
set -euo pipefail

machine=$1
name=$2
address=${3:-198.51.100.7}
for hierarchy in /sys/fs/cgroup $(find /sys/fs/cgroup -mindepth 1 -maxdepth 1 -type d); do
    [ -e "$hierarchy/cgroup.procs" ] && mountpoint -q "$hierarchy" || continue
    mkdir -p "$hierarchy/$name"
    # A cpuset without processors accepts no process.
    for file in cpuset.cpus cpuset.mems; do
        [ ! -e "$hierarchy/$file" ] || [ -e "$hierarchy/cgroup.controllers" ] || cat "$hierarchy/$file" >"$hierarchy/$name/$file"
    done
    echo $$ >"$hierarchy/$name/cgroup.procs"
done

exec unshare --mount --pid --fork --kill-child --net --uts --ipc --cgroup sh -euc '
    mount --make-rprivate /
    mount --bind "$1" "$1"
    cd "$1"
    mount -t proc proc proc
    mount -t sysfs sysfs sys
    mount -t tmpfs -o mode=755 tmpfs run
    mount -t tmpfs -o mode=755 tmpfs dev
    for device in null zero full random urandom tty fuse; do
        [ -e "/dev/$device" ] || continue
        touch "dev/$device"
        mount --bind "/dev/$device" "dev/$device"
    done
    mkdir dev/pts dev/shm dev/mqueue
    mount -t devpts -o newinstance,ptmxmode=666,mode=620,gid=5 devpts dev/pts
    mount -t tmpfs tmpfs dev/shm
    mount -t mqueue mqueue dev/mqueue
    ln -s pts/ptmx dev/ptmx
    ln -s /proc/self/fd dev/fd
    if [ -e /sys/fs/cgroup/cgroup.controllers ]; then
        mount -t cgroup2 cgroup2 sys/fs/cgroup
    else
        mount -t tmpfs -o mode=755 tmpfs sys/fs/cgroup
        for hierarchy in /sys/fs/cgroup/*/; do
            controller=$(basename "$hierarchy")
            mountpoint -q "$hierarchy" || continue
            mkdir "sys/fs/cgroup/$controller"
            case $controller in
            unified) mount -t cgroup2 cgroup2 "sys/fs/cgroup/$controller" ;;
            systemd) mount -t cgroup -o none,name=systemd cgroup "sys/fs/cgroup/$controller" ;;
            *) mount -t cgroup -o "$controller" cgroup "sys/fs/cgroup/$controller" ;;
            esac
        done
    fi
    hostname "$2"
    ip link set lo up
    ip link add eth0 type veth peer name eth1
    ip address add "$3/24" dev eth0
    ip link set eth0 up
    ip link set eth1 up
    ip route add default via 198.51.100.1 dev eth0
    pivot_root . mnt
    # systemd 256 and later refuse hierarchies of version 1 unless told.
    exec chroot . env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin container=other SYSTEMD_CGROUP_ENABLE_LEGACY_FORCE=1 \
        sh -c "umount -l /mnt; exec /lib/systemd/systemd --show-status=no --unit=multi-user.target"
' sh "$machine" "$name" "$address"

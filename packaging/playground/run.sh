#!/bin/bash
# Entry point of the image skep-playground: runs the demo until SIGTERM, then removes it.
set -euo pipefail

playground() { skep playground "$1" --dir /var/lib/skep/demo --name demo "${@:2}"; }

if ! mount -t tmpfs tmpfs /mnt 2>/dev/null; then
    echo "The playground makes namespaces and mounts: start it with docker run --privileged." >&2
    exit 1
fi
umount /mnt

# On cgroup v2, only a group without processes can give controllers to its children.
if [ -e /sys/fs/cgroup/cgroup.controllers ]; then
    mkdir -p /sys/fs/cgroup/init
    while read -r pid; do
        echo "$pid" >/sys/fs/cgroup/init/cgroup.procs || true # it has ended
    done </sys/fs/cgroup/cgroup.procs
    sed 's/ / +/g; s/^/+/' /sys/fs/cgroup/cgroup.controllers >/sys/fs/cgroup/cgroup.subtree_control
fi

trap 'playground down; exit 0' TERM INT
playground down 2>/dev/null # what a killed container left in its volume
playground demo --address 0.0.0.0 --image-archive /root/nginx.tar
sleep infinity &
wait

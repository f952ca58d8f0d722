#!/bin/bash
# Installs a release on three machines and follows a course on them: course.sh bare|virtual SUITE RELEASE
#   bare     root file systems that boot systemd, on this kernel.  A newcomer's course: install, make a cluster, deploy the
#            cookbook's web application, with files and commands from the release's site, drain a node, lose the manager,
#            restore its backup
#   virtual  virtual machines with the suite's kernel, systemd and cgroup v2 alone.  The course of the talks, an encrypted
#            network by the kernel's WireGuard, then each machine is cut off and rebooted
# The machines are in a network of their own, with tests/support/courses at the other end.  It serves RELEASE (make release)
# to them, and uses the command of the release's wheel.  The machines cannot reach a package archive, so apt has the packages
# that Skep's package needs in its cache.
# Virtual machines are emulated, each with MEMORY_MB (1536) and one processor, so their course takes about an hour on a quiet
# machine.  On a busy one they lose their connections: with ICOUNT=1 their clocks count instructions (see virtual.sh).
# INSTALLED=1 gives them Skep's package before they boot, so that a course that has no hour begins with skep up.
# Needs root, debootstrap and ssh, and for virtual qemu-system-x86 and e2fsprogs.  All created files are removed.
set -euo pipefail
cd "$(dirname "$0")/.."
. setup/say.sh
. setup/suite.sh
. setup/machine.sh

kind=${1:?bare or virtual?}
suite=${2:?which suite?}
release=$(realpath "${3:?which release?}")
[ "$(id -u)" = 0 ] || fail "this needs root" "run it as root"
[ -e "$release/install.sh" ] || fail "there is no release in $release" "make release VERSION=0.1.0"
know_suite "$suite"
PATH=$PATH:/usr/sbin:/sbin
needed="debootstrap ssh ssh-keygen"
packages="openssh-server curl kmod"
case $kind in
bare) [ -e "$release/site/index.html" ] || fail "there is no site in $release" "make release VERSION=0.1.0" ;;
virtual) needed="$needed qemu-system-x86_64 mke2fs" packages="$packages udev $kernel" ;;
*) fail "there is no course $kind" "bare or virtual" ;;
esac
for one in $needed; do
    command -v "$one" >/dev/null || fail "$one is missing" "apt-get install debootstrap openssh-client qemu-system-x86 e2fsprogs"
done

place=$(mktemp -d /var/tmp/skep-course-XXXXXX)
trap 'rm -rf --one-file-system "$place"' EXIT
say "$suite: three $kind machines, commit $(git rev-parse --short HEAD)"
ssh-keygen -q -t ed25519 -N '' -f "$place/user"
say "the command of the release, for the machine that operates the cluster"
python3 -m venv "$place/operator"
"$place/operator/bin/pip" --disable-pip-version-check -qq install "$release"/skep_orchestrator-*.whl </dev/null
first=$place/first
# shellcheck disable=SC2086  # several packages
setup/bootable.sh --fetch-only "$suite" "$first" "$release"/skep_*_"$(dpkg --print-architecture)".deb $packages >"$place/log" 2>&1 || {
    tail -20 "$place/log" >&2
    fail "the machines could not be prepared (above)"
}
# Without the settings of this machine's network and those that empty apt's cache.
(cd "$first/etc/apt/apt.conf.d" && comm -12 <(ls) <(ls /etc/apt/apt.conf.d) | xargs -r rm -f)
install -D -m 600 "$place/user.pub" "$first/root/.ssh/authorized_keys"
chmod 700 "$first/root/.ssh"
cp "$first/etc/ssh/ssh_host_ed25519_key.pub" "$place/host.pub"

if [ -n "${INSTALLED:-}" ]; then
    cp "$release"/skep_*_"$(dpkg --print-architecture)".deb "$first/root/skep.deb"
    run_inside "$first" "apt-get -q -y install --no-install-recommends /root/skep.deb" /root </dev/null >"$place/log" 2>&1 || {
        tail -20 "$place/log" >&2
        fail "the package could not be installed (above)"
    }
    rm "$first/root/skep.deb"
fi

# finish NUMBER: makes machine NUMBER of the first.
finish() {
    local machine=$place/node$1
    cp -a --reflink=auto "$first" "$machine"
    echo "node$1" >"$machine/etc/hostname"
    printf '127.0.0.1 localhost\n198.51.100.1%s node%s\n' "$1" "$1" >"$machine/etc/hosts"
    : >"$machine/etc/machine-id"
    [ "$kind" = virtual ] || return 0
    printf '[Match]\nName=eth0\n\n[Network]\nAddress=198.51.100.1%s/24\nGateway=198.51.100.1\n' "$1" \
        >"$machine/etc/systemd/network/10-eth0.network"
    mkdir -p "$machine/etc/systemd/system/multi-user.target.wants"
    ln -sf /lib/systemd/system/systemd-networkd.service "$machine/etc/systemd/system/multi-user.target.wants/"
    printf '/dev/vda / ext4 defaults 0 1\n' >"$machine/etc/fstab"
    # The unit's minute is short for an emulated processor.
    install -D -m 644 /dev/stdin "$machine/etc/systemd/system/skep.service.d/patient.conf" <<<$'[Service]\nTimeoutStartSec=600'
    mke2fs -q -t ext4 -d "$machine" "$place/node$1.disk" "$(($(du -sm --one-file-system "$machine" | cut -f 1) * 12 / 10 + 3072))M" >/dev/null
    rm -rf --one-file-system "$machine"
}

if [ "$kind" = virtual ]; then
    kernel_file=$(ls "$first"/boot/vmlinuz-*)
    cp "$kernel_file" "$place/vmlinuz"
    cp "${kernel_file/vmlinuz/initrd.img}" "$place/initrd"
else
    # shellcheck disable=SC2046  # several packages
    setup/debian-image.sh bookworm "$place/debian.tar" $(tar -xzOf "$release/site/cookbook/postgres.tar.gz" --wildcards '*/Dockerfile' |
        sed -n 's/.*install --yes --no-install-recommends \([^&\\]*\).*/\1/p')
fi
for number in 1 2 3; do finish "$number"; done
rm -rf --one-file-system "$first"
unshare --net .venv/bin/python -u -m tests.support.courses "$kind" "$suite" "$place" "$release"

#!/bin/bash
# Runs commands on a machine with its own kernel: virtual.sh SUITE COMMAND...
# Creates the bare machine of bare.sh, sets it up, and boots it in an emulator with the kernel of that suite: only cgroup v2,
# AppArmor, the distribution's modules (VXLAN, IPVS, WireGuard, NFS, ...), its Docker Engine for comparison, its NFS and CIFS
# servers, a file system without overlays below it.
# The machine has no network to the outside, so steps that need one run before it boots.
# Its processor is emulated, so everything takes some five times as long.  KVM=1 uses the real processor, which must have
# hardware virtualization: on the /dev/kvm of a kernel without it (PVM), distribution kernels stop at their first
# instructions.
# On a busy machine, the kernel would take the emulated timer for a broken one, so it does not check it, and time limits of
# tests are exceeded there.  ICOUNT=3 makes its clock count instructions of 2^3 ns each,
# whatever they take here.  ICOUNT=1 counts 2 ns: more fits into a limit, and everything takes longer.
# ARCH=arm64 emulates that processor, for the set-up by qemu's user emulation.  Debian's suites, not with KVM=1 or SELINUX=1.
# SELINUX=1 boots it with SELinux in the place of AppArmor: Debian's policy (of trixie or later, because older ones have no
# rules for containers) with packaging/selinux/skep.cil, in enforcing mode.  Commands run in the domain of a service.
# Needs root, debootstrap, qemu-system-x86 (or qemu-system-arm) and e2fsprogs.  Its size is CPUS (default 1, because newer
# kernels crashed with several that are emulated in parallel) and MEMORY_MB (default 4096).  It may run for DEADLINE_S
# (default 3600).
# SYSTEMD=1 boots it by systemd, which runs the commands as a service once it can start others.  The machine then has the
# commit's Debian package in dist/.
# KEEP=1 keeps the machine in $MACHINES (/var/cache/skep-machines), some 3 GB.  The next run with KEEP=1 takes it from there, with
# the then current commit, so that only the first one needs its set-up.  One kept machine serves one run at a time.
# The exit code is that of the first command that failed.  All other created files are removed.
set -euo pipefail
cd "$(dirname "$0")/.."
. setup/say.sh
. setup/suite.sh
. setup/machine.sh

suite=${1:?which suite?}
shift
[ $# -gt 0 ] || fail "nothing to run" "virtual.sh $suite COMMAND..."
[ "$(id -u)" = 0 ] || fail "this needs root" "run it as root"
PATH=$PATH:/usr/sbin:/sbin
case ${ARCH:-} in
"") qemu="qemu-system-x86_64 -M q35,acpi=on -cpu max" console=ttyS0 ;;
# The processor's own way to sign pointers takes most of the time of an emulated one.
arm64) qemu="qemu-system-aarch64 -M virt -cpu max,pauth-impdef=on" console=ttyAMA0 ;;
*) fail "$ARCH is not emulated here" "arm64 is" ;;
esac
for needed in "${qemu%% *}" mke2fs; do
    command -v "$needed" >/dev/null || fail "$needed is missing" "apt-get install qemu-system-x86 qemu-system-arm e2fsprogs"
done

[ -z "${KVM:-}" ] || grep -qwE 'vmx|svm' /proc/cpuinfo ||
    fail "KVM=1: this machine's processor has no virtualization" "leave KVM out: the processor is emulated"

place=$(mktemp -d /var/tmp/skep-virtual-XXXXXX)
trap 'stop_emulation; rm -rf --one-file-system "$place"' EXIT
machine=$place/machine
if [ -n "${KEEP:-}" ]; then
    machine=${MACHINES:-/var/cache/skep-machines}/virtual-$suite${ARCH:+-$ARCH}${SELINUX:+-selinux}
    mkdir -p "${machine%/*}"
    exec 9>"$machine.lock"
    flock -n 9 || fail "$machine is in use by another run" "wait for its end, or leave KEEP out"
fi
say "$suite: a virtual machine${ARCH:+ of $ARCH}, commit $(git rev-parse --short HEAD)"
[ -z "${ARCH:-}" ] || emulate "$ARCH" "$place/emulator"

# inside COMMAND: runs it in the machine that is being made.
inside() {
    run_inside "$machine" "$1" </dev/null >"$place/log" 2>&1 || {
        tail -20 "$place/log" >&2
        fail "the machine could not be set up (above)"
    }
}

# Ubuntu's kernels only recommend what makes the initial RAM disk.
packages="initramfs-tools kmod udev apparmor docker.io nfs-kernel-server rpcbind samba smbclient"
packages="$packages systemd-sysv libpam-systemd dbus-user-session"
confinement="apparmor=1 security=apparmor"
if [ -n "${SELINUX:-}" ]; then
    packages="$packages selinux-basics selinux-policy-default"
    # It is enforced from the first command on.  The first process starts in a domain that may not become a service's.
    confinement="selinux=1 security=selinux enforcing=0"
fi
if [ "$(cat "$machine/root/ready" 2>/dev/null)" = "$packages" ]; then
    say "$suite: using the machine that was kept"
    git bundle create -q "$machine/root/commit" HEAD
    inside "git fetch -q /root/commit HEAD && git reset -q --hard FETCH_HEAD && make setup"
else
    rm -rf --one-file-system "$machine"
    make_machine "$suite" "$machine"
    say "$suite: setting it up, with the kernel of $kernel"
    # Services that the packages start would run on this machine's kernel.
    printf '#!/bin/sh\nexit 101\n' >"$machine/usr/sbin/policy-rc.d"
    chmod +x "$machine/usr/sbin/policy-rc.d"
    inside "make setup && apt-get -q -y install --no-install-recommends $kernel $packages"
    rm -rf "$machine/var/cache/apt/archives" "$machine/var/lib/apt/lists"
    echo "$packages" >"$machine/root/ready"
fi
# An emulated processor takes minutes to compile the modules.
inside ".venv/bin/python -m compileall -q skep tests"

# The first process of the machine: instead of a service manager, only what the commands need.  Or systemd's service.
cat >"$machine/root/first" <<'EOF'
#!/bin/bash
service=system_u:system_r:initrc_t:s0
export HOME=/root TERM=dumb CI=true SKEP_VIRTUAL=1 PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
mountpoint -q /proc || mount -t proc proc /proc
mountpoint -q /sys || mount -t sysfs sysfs /sys
if grep -qw security=selinux /proc/cmdline && [ "${1:-}" != confined ]; then
    [ -d /run/systemd/system ] || load_policy -i
    exec runcon $service "$0" confined
fi
if [ ! -d /run/systemd/system ]; then
    mount -t cgroup2 cgroup2 /sys/fs/cgroup
    mount -t securityfs securityfs /sys/kernel/security
    mkdir -p /dev/pts /dev/shm /dev/mqueue
    mountpoint -q /dev/pts || mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts /dev/pts
    mount -t tmpfs tmpfs /dev/shm
    mount -t tmpfs tmpfs /run
    mount -t tmpfs tmpfs /tmp
    [ -e /dev/fd ] || ln -s /proc/self/fd /dev/fd
    # Ubuntu's kernel restricts users' namespaces by a setting of the distribution.
    [ ! -e /usr/lib/sysctl.d/10-apparmor.conf ] || sysctl -q -p /usr/lib/sysctl.d/10-apparmor.conf
else
    rm -f /usr/sbin/policy-rc.d # packages start their services from here on
fi
if [ "${1:-}" = confined ]; then
    restorecon -R /dev /run /tmp
    setenforce 1
    echo "SELinux: $(getenforce), commands run as $(cat /proc/self/attr/current | tr -d '\0')"
fi
hostname virtual
ip link set lo up
cd /root/skep
echo "kernel $(uname -r), cgroup controllers of version 2: $(cat /sys/fs/cgroup/cgroup.controllers)"
echo "kernel confines by $(cat /sys/kernel/security/lsm)"
code=0
while read -r command; do
    began=$SECONDS
    echo "\$ $command"
    bash -c "$command" </dev/null 2>&1 || code=$?
    echo "exit $code, $((SECONDS - began)) s"
    [ $code = 0 ] || break
done </root/commands
[ "${1:-}" != confined ] || dmesg | grep "avc:  denied" | tail -100
echo "code $code"
sync
# By then the disk may be off, so no program can be loaded.
echo o >/proc/sysrq-trigger
while :; do :; done
EOF
chmod +x "$machine/root/first"
printf '%s\n' "$@" >"$machine/root/commands"
boot="init=/root/first"
rm -rf "$machine/root/skep/dist"
if [ -n "${SYSTEMD:-}" ]; then
    setup/package.sh "$machine/root/skep/dist" >"$place/log" 2>&1 || fail "there is no package: $(tail -1 "$place/log")"
    # Not multi-user.target, which would start the file servers and Docker.
    boot="systemd.unit=commands.service systemd.show_status=0 systemd.firstboot=off"
    cat >"$machine/etc/systemd/system/commands.service" <<EOF
[Unit]
Wants=basic.target systemd-logind.service apparmor.service
After=basic.target systemd-logind.service apparmor.service
[Service]
Type=oneshot
ExecStart=/root/first
StandardOutput=tty
StandardError=tty
TTYPath=/dev/$console
Delegate=yes
EOF
fi

# Create an image as large as its content and 4 GiB of free space.  The files are unlinked as soon as they are packed.
kernel_file=$(ls "$machine"/boot/vmlinuz-*)
cp "$kernel_file" "${kernel_file/vmlinuz/initrd.img}" "$place"
if [ -n "${SELINUX:-}" ]; then
    say "$suite: labeling its files"
    contexts=/etc/selinux/default/contexts/files/file_contexts
    inside "semodule -n -i packaging/selinux/skep.cil && setfiles -F -e /proc -e /sys -e /dev -e /run $contexts /"
fi
size_mb=$(($(du -sm --one-file-system "$machine" | cut -f 1) * 12 / 10 + 4096))
mke2fs -q -t ext4 -d "$machine" "$place/disk" "${size_mb}M" >/dev/null
[ -n "${KEEP:-}" ] || rm -rf --one-file-system "$machine"

accelerator=tcg,thread=multi
[ -z "${ICOUNT:-}" ] || accelerator="tcg,thread=single -icount shift=$ICOUNT"
[ -z "${KVM:-}" ] || accelerator=kvm
say "$suite: booting"
began=$SECONDS
# shellcheck disable=SC2086  # an accelerator and its options
timeout "${DEADLINE_S:-3600}" $qemu -accel $accelerator -smp "${CPUS:-1}" \
    -m "${MEMORY_MB:-4096}" -nodefaults -no-user-config -display none -no-reboot -nic none -serial stdio \
    -drive "file=$place/disk,format=raw,if=virtio,cache=unsafe" \
    -kernel "$place"/vmlinuz-* -initrd "$place"/initrd.img-* \
    -append "root=/dev/vda rw console=$console quiet loglevel=3 panic=-1 no_timer_check $confinement $boot" </dev/null | sed -u 's,\r,,g' | tee "$place/output" ||
    fail "$suite: the machine did not end within ${DEADLINE_S:-3600} s, or could not be started (above)"
code=$(sed -n 's/^code \([0-9]*\)$/\1/p' "$place/output" | tail -1)
say "$suite: ended with ${code:-no} exit code after $((SECONDS - began)) s"
exit "${code:-1}"

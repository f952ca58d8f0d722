# Sourced by bare.sh, virtual.sh and others: creates a bare machine in a directory, with a fresh clone of the current commit.

# know_suite SUITE: sets $distribution, $components, $updates (suites), $kernel (package for $ARCH or amd64) and $script
# (debootstrap's).
know_suite() {
    case $1 in
    bookworm | trixie | forky)
        distribution=debian components=main updates=$1-updates kernel=linux-image-cloud-${ARCH:-amd64} script=sid
        ;;
    noble | resolute)
        distribution=ubuntu components=main,universe updates="$1-updates $1-security" kernel=linux-image-virtual
        script=gutsy # of all of Ubuntu's
        ;;
    *) fail "the suite $1 is not known here" "bookworm, trixie, forky, noble or resolute" ;;
    esac
}

# mirror_of DISTRIBUTION: prints the archive that this machine uses for it, or nothing for debootstrap's default.
mirror_of() {
    apt-get indextargets --format '$(SITE)|$(ORIGIN)|$(COMPONENT)' 'Created-By: Packages' |
        awk -F '|' -v origin="$1" 'tolower($2) == origin && $3 == "main" { print $1; exit }'
}

# keyring_of DISTRIBUTION DIRECTORY: prints the file with the keys of its archive.  If this machine lacks it, it is
# unpacked into the directory from a package of trixie, whose signature apt checks.
keyring_of() {
    local keyring=/usr/share/keyrings/$1-archive-keyring.gpg
    if [ ! -r "$keyring" ]; then
        # shellcheck disable=SC2086
        use_suite "$2" "$(archive_of main)" trixie main /usr/share/keyrings/debian-archive-keyring.gpg >&2 &&
            (cd "$2" && apt-get $suite_options -q download "$1-keyring") >&2 ||
            fail "the keys of $1 are missing: $keyring" "install the package that has them"
        dpkg-deb -x "$2/$1-keyring"_*.deb "$2"
        keyring=$2$keyring
    fi
    echo "$keyring"
}

# emulate ARCHITECTURE DIRECTORY: has the kernel run programs of another processor by qemu's user emulation, which is unpacked
# into the directory and not installed.  stop_emulation ends that.  A handler that the machine has already is used and stays.
emulate() {
    local handlers=/proc/sys/fs/binfmt_misc magic
    case $1 in
    # An ELF header: 64 bits, little endian, and the processor's number.
    arm64) emulator=qemu-aarch64 magic='\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00' ;;
    *) fail "$1 is not emulated here" "arm64 is" ;;
    esac
    [ -e $handlers/register ] || mount -t binfmt_misc binfmt_misc $handlers ||
        fail "the kernel has no binfmt_misc, so it runs no programs of $1" "use a machine of that processor"
    [ ! -e $handlers/$emulator ] || return 0
    mkdir -p "$2"
    (cd "$2" && apt-get -o APT::Sandbox::User=root -q download qemu-user-static >&2 && dpkg-deb -x qemu-user-static_*.deb .)
    stop_emulation # the handler of a run that was killed
    # With the flag F, the kernel opens the emulator now, so that machines with roots of their own need no copy.
    printf ':skep-%s:M::%s:\\xff\\xff\\xff\\xff\\xff\\xff\\xff\\x00\\xff\\xff\\xff\\xff\\xff\\xff\\xff\\xff\\xfe\\xff\\xff\\xff:%s:F' \
        "$emulator" "$magic" "$2/usr/bin/$emulator-static" >$handlers/register
}

stop_emulation() {
    [ ! -e "/proc/sys/fs/binfmt_misc/skep-${emulator:-}" ] || echo -1 >"/proc/sys/fs/binfmt_misc/skep-$emulator"
}

# make_system SUITE DIRECTORY [PACKAGES]: creates the suite's base system with python3 and PACKAGES (separated by commas), for
# the processor $ARCH or this machine's.
make_system() {
    local log=$2.log keyring suite
    know_suite "$1"
    command -v debootstrap >/dev/null || fail "debootstrap is missing" "apt-get install debootstrap"
    mkdir -p "$2.keys"
    keyring=$(keyring_of "$distribution" "$2.keys" 2>"$log") || { tail -5 "$log" >&2 && exit 1; }
    debootstrap ${ARCH:+--arch "$ARCH"} --variant=minbase --force-check-gpg --keyring "$keyring" --components "$components" \
        --include="python3,ca-certificates${3:+,$3}" "$1" "$2" "$(mirror_of "$distribution")" "$script" >"$log" 2>&1 || {
        tail -5 "$log" >&2
        fail "debootstrap of $1 failed (above)"
    }
    for suite in $updates; do
        sed "s/ $1 / $suite /" <(grep "^deb .* $1 " "$2/etc/apt/sources.list") >>"$2/etc/apt/sources.list.d/updates.list"
    done
    rm -rf "$log" "$2.keys"
}

# kept_system NAME SUITE [PACKAGES]: creates a system once in $MACHINES (/var/cache/skep-machines), and sets $kept to it.
kept_system() {
    kept=${MACHINES:-/var/cache/skep-machines}/$1
    mkdir -p "${kept%/*}"
    (
        flock 9
        [ ! -d "$kept" ] || exit 0
        say "$1: fetching the system"
        rm -rf --one-file-system "$kept.new"
        make_system "$2" "$kept.new" "${@:3}"
        mv "$kept.new" "$kept"
    ) 9>"$kept.lock"
}

# copy_base SUITE DIRECTORY: copies the suite's base system.
copy_base() {
    kept_system "$1" "$1"
    cp -a --reflink=auto "$kept" "$2"
}

# place_in_network DIRECTORY: copies name servers, the settings of apt and pip, and the certificate authorities.
place_in_network() {
    cp -L /etc/resolv.conf "$1/etc/resolv.conf"
    [ -e "$1/etc/hosts" ] || printf '127.0.0.1 localhost\n::1 localhost\n' >"$1/etc/hosts"
    cp /etc/apt/apt.conf.d/* "$1/etc/apt/apt.conf.d/"
    [ ! -e /etc/pip.conf ] || grep -v -e file: -e find-links /etc/pip.conf >"$1/etc/pip.conf" || true
    cp -L /etc/ssl/certs/ca-certificates.crt "$1/etc/ssl/certs/ca-certificates.crt"
}

# make_machine SUITE DIRECTORY: creates a machine with only Python, make, git and the clone in /root/skep.
make_machine() {
    make_system "$1" "$2" make,git
    place_in_network "$2"
    git clone -q . "$2/root/skep"
}

# run_inside DIRECTORY COMMAND [WHERE]: runs COMMAND in the clone or in WHERE.  The machine is the root of its own mount and PID
# namespaces, because a process that enters the mounts would leave a plain chroot.  Kernel and network are this machine's,
# but not the environment.
run_inside() {
    unshare --mount --pid --fork --kill-child sh -euc '
        mount --make-rprivate /
        mount --bind "$1" "$1"
        mount --rbind /dev "$1/dev"
        mount --rbind /sys "$1/sys"
        mount -t proc proc "$1/proc"
        mount -t tmpfs tmpfs "$1/run"
        cd "$1"
        pivot_root . mnt
        exec chroot . env -i HOME=/root PATH="$PATH" TERM=dumb CI=true \
            sh -c "umount -l /mnt && cd $3 && $2"
    ' sh "$1" "$2" "${3:-/root/skep}"
}

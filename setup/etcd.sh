#!/bin/bash
# Places etcd, etcdctl and etcdutl, 3.5.16 or newer, in a directory: etcd.sh DIRECTORY [ARCHITECTURE]
#
# They are unpacked from the distribution's packages but not installed, because the installation
# would start an etcd service on the machine.  apt checks their signatures with the distribution's
# keyring, keeps its state in a private directory, and uses the machine's mirror.
set -euo pipefail
cd "$(dirname "$0")"
. ./say.sh
. ./suite.sh

oldest=3.5.16
target=$1
native=$(dpkg --print-architecture 2>/dev/null || true)
architecture=${2:-$native}
packages="etcd-server etcd-client"

# acceptable VERSION: 3.6.0 to 3.6.4 lose members when they start on data of 3.5.
acceptable() {
    local version=$1
    [ -n "$version" ] && at_least "$version" "$oldest" || return 1
    ! at_least "$version" 3.6.0 || at_least "$version" 3.6.5
}

# version_of BINARY: prints the version of etcd, or nothing.
version_of() { "$1" --version 2>/dev/null | sed -n 's/^etcd Version: //p'; }

# Set-up may run at every make, and then costs only a look at the three files.
if [ -x "$target/etcdctl" ] && [ -x "$target/etcdutl" ] && acceptable "$(version_of "$target/etcd")"; then
    exit 0
fi

command -v apt-get >/dev/null || fail "etcd $oldest or newer is needed, and there is no apt-get to fetch it with" \
    "put etcd, etcdctl and etcdutl into $target"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/unpacked"

# unpack [APT OPTION...]: fetches the packages and leaves their binaries in $work/unpacked.
unpack() {
    rm -rf "$work"/*.deb "$work/unpacked"
    mkdir "$work/unpacked"
    (cd "$work" && apt-get "$@" -q download $packages) >"$work/log" 2>&1 || return 1
    local package
    for package in "$work"/*.deb; do
        dpkg-deb -x "$package" "$work/unpacked"
    done
    # A program for another processor does not run here, so its package says which version it is.
    if [ "$architecture" = "$native" ]; then
        version=$(version_of "$work/unpacked/usr/bin/etcd")
    else
        version=$(dpkg-deb -f "$work"/etcd-server_*.deb Version | sed 's/-.*//')
    fi
    acceptable "$version" && [ -x "$work/unpacked/usr/bin/etcdutl" ]
}

# place: puts all three into the directory, each replaced in one step.
place() {
    mkdir -p "$target"
    local name
    for name in etcdctl etcdutl etcd; do
        install -m 0755 "$work/unpacked/usr/bin/$name" "$target/.$name.new"
        mv "$target/.$name.new" "$target/$name"
    done
    say "etcd $version is in $target"
}

# The user _apt may not read root's private directory.  The signatures are still checked.
private="-o APT::Sandbox::User=root"

candidate=$(apt-cache policy etcd-server 2>/dev/null | sed -n 's/^ *Candidate: //p')
if [ "$architecture" = "$native" ] && [ -n "$candidate" ] && [ "$candidate" != "(none)" ] && at_least "${candidate%%-*}" "$oldest"; then
    if unpack $private; then
        place
        exit 0
    fi
fi

name=$(distribution)
read -r _ component keyring suites < <(grep "^$name " etcd-suites.txt) ||
    fail "etcd $oldest or newer is needed, and $name is not a distribution whose suites are known here" \
        "put etcd, etcdctl and etcdutl into $target"
keyring=/usr/share/keyrings/$keyring
[ -r "$keyring" ] || fail "the keyring of $name is missing: $keyring" "apt-get install ${keyring##*/} (its package)"

mirror=$(archive_of "$component")
[ -n "$mirror" ] || fail "apt has no archive with the component $component" \
    "add it to the machine's sources, or put etcd, etcdctl and etcdutl into $target"

for suite in $suites; do
    say "fetching etcd from the suite $suite"
    # The options are words without blanks, meant to be split.
    # shellcheck disable=SC2086
    if use_suite "$work" "$mirror" "$suite" "$component" "$keyring" "$architecture" >"$work/log" 2>&1 && unpack $suite_options; then
        place
        exit 0
    fi
done
cat "$work/log" >&2
fail "no suite of $name has an etcd of $oldest or newer for $architecture (tried: $suites)" \
    "check the machine's way to its package mirror (above: what apt said)," \
    "or put etcd, etcdctl and etcdutl into $target"

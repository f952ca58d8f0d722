#!/bin/sh
# Installs a release of Skep from a folder that a web server has, or from a local one:
#
#   sh install.sh --from https://skep.example.com/releases/0.1.0    (a placeholder: no such address is known)
#   sh install.sh --from /media/skep/release-0.1.0
#   sh install.sh --uninstall
#
#   --from ADDRESS       folder of the release: https://, http:// or a path
#   --version VERSION    version to install, by default that of this script
#   --key FINGERPRINT    key that must have signed the release, by default that of this script
#   --allow-unsigned     accept a release without a signature.  Checksums are still compared
#   --no-apt             install the tarball even where apt is
#   --uninstall          remove Skep.  Data (/var/lib/skep) and settings (/etc/skep) stay
#
# Nothing is changed before the signature and the checksums are verified.  A second run changes nothing.
# With apt, the release becomes one of its sources.  Elsewhere, the tarball is unpacked below /opt/skep.
set -eu

# Set by make release.
version=
fingerprint=

from=
is_unsigned_allowed=
is_apt_allowed=yes
action=install
keyring=skep-archive-keyring.gpg
source=/etc/apt/sources.list.d/skep.list
place=/opt/skep
unit=/etc/systemd/system/skep.service

say() { printf 'skep: %s\n' "$*"; }
fail() {
    printf 'skep: %s\n' "$1" >&2
    shift
    [ $# = 0 ] || printf '      %s\n' "$@" >&2
    exit 1
}
has() { command -v "$1" >/dev/null 2>&1; }

# fetch NAME: copies a file of the release into $work.
fetch() {
    case $from in
    http://* | https://*)
        if has curl; then
            curl -fsSL --retry 3 -o "$work/$1" "$from/$1"
        elif has wget; then
            wget -q -O "$work/$1" "$from/$1"
        elif [ -x /usr/lib/apt/apt-helper ]; then
            /usr/lib/apt/apt-helper -o APT::Sandbox::User=root -q download-file "$from/$1" "$work/$1" >/dev/null 2>&1
        else
            fail "there is no curl and no wget to download with" "install one of them, or copy the folder here and name its path"
        fi
        ;;
    *) cp "$from/$1" "$work/$1" 2>/dev/null ;;
    esac
}

need() { fetch "$1" || fail "$from/$1 cannot be fetched" "check the address (--from)"; }

# verify: ends the script unless the checksums are signed by the expected key.
verify() {
    need SHA256SUMS
    if [ -z "$fingerprint" ]; then
        [ -n "$is_unsigned_allowed" ] || fail "this script knows no key, so it cannot check the signature" \
            "name the key's fingerprint (--key), or accept an unsigned release (--allow-unsigned)"
        say "the signature is not checked, as you asked"
        return
    fi
    need SHA256SUMS.asc
    need "$keyring"
    # The keyring came with the release.  The fingerprint that this script has decides.
    if has gpgv; then
        gpgv --keyring "$work/$keyring" --status-fd 3 "$work/SHA256SUMS.asc" "$work/SHA256SUMS" 3>"$work/signers" 2>"$work/said"
    elif has sqv; then # Debian 13's apt has this instead
        sqv --keyring "$work/$keyring" "$work/SHA256SUMS.asc" "$work/SHA256SUMS" 2>"$work/said" | sed 's/^/[GNUPG:] VALIDSIG /' \
            >"$work/signers"
        [ -s "$work/signers" ]
    else
        fail "gpgv is missing, which checks the signature" "install the package gpgv, gnupg or sqv"
    fi || fail "the signature of $from is wrong. Nothing was changed" "$(tail -n 1 "$work/said")"
    grep -q "^\[GNUPG:\] VALIDSIG .*$fingerprint" "$work/signers" ||
        fail "$from is signed by another key than $fingerprint. Nothing was changed"
    say "signed by $fingerprint"
}

# checked NAME: fetches a file and compares its checksum.
checked() {
    grep -q "  $1\$" "$work/SHA256SUMS" || fail "$from has no $1. Nothing was changed" "check the version (--version)"
    need "$1"
    (cd "$work" && grep "  $1\$" SHA256SUMS | sha256sum -c - >/dev/null 2>&1) ||
        fail "the checksum of $1 is wrong. Nothing was changed" "download it again, or tell who serves $from"
}

# next_step: says what to do with an installed node.
next_step() {
    say "to make a cluster of several machines from one that reaches them by ssh: skep up root@FIRST root@SECOND ..."
    if has docker; then
        say "to begin with this machine alone: skep swarm init"
    else
        say "to begin with this machine alone, install the docker command (docker-cli or docker.io), then: skep swarm init"
    fi
}

with_apt() {
    case $(dpkg --print-architecture) in
    amd64 | arm64) architecture=$(dpkg --print-architecture) ;;
    *) fail "the architecture $(dpkg --print-architecture) is not supported" "amd64 and arm64 are" ;;
    esac
    package=skep_${version}_$architecture.deb
    grep -q "  $package\$" "$work/SHA256SUMS" || fail "$from has no package for $architecture. Nothing was changed"
    case $from in
    http://* | https://*) archive=$from/apt ;;
    *) archive=file:$(cd "$from" && pwd)/apt ;;
    esac
    if [ -n "$fingerprint" ]; then
        checked "$keyring" # which has no other key than the release had
        mkdir -p /usr/share/keyrings
        install -m 644 "$work/$keyring" "/usr/share/keyrings/$keyring"
        option=signed-by=/usr/share/keyrings/$keyring
    else
        option=trusted=yes
    fi
    echo "deb [$option] $archive stable main" >"$work/list"
    cmp -s "$work/list" "$source" || install -D -m 644 "$work/list" "$source"
    apt-get -q update -o Dir::Etc::SourceList="$source" -o Dir::Etc::SourceParts=/dev/null -o APT::Get::List-Cleanup=false \
        -o APT::Update::Error-Mode=any >/dev/null || fail "apt cannot read $archive (above)"
    DEBIAN_FRONTEND=noninteractive apt-get -q -y install "skep=$version" ||
        fail "apt cannot install skep $version (above)" "apt-get update, then run this script again"
    say "$(skep --version) is installed by apt"
    next_step
}

with_tarball() {
    case $(uname -m) in
    x86_64) loader=/lib64/ld-linux-x86-64.so.2 ;;
    aarch64) loader=/lib/ld-linux-aarch64.so.1 ;;
    *) fail "the architecture $(uname -m) is not supported" "x86_64 and aarch64 are" ;;
    esac
    name=skep-$version-linux-$(uname -m)
    if [ "$(readlink "$place/current" 2>/dev/null)" = "$place/$name" ] && [ -x "$place/$name/bin/skep" ]; then
        say "$version is already installed in $place"
        return
    fi
    [ -e "$loader" ] || fail "this system has no GNU C library, which the tarball needs" \
        "use a distribution with glibc (Alpine has none)"
    checked "$name.tar.gz"
    rm -rf "$place/$name.new"
    mkdir -p "$place/$name.new" /usr/local/bin
    tar -xzf "$work/$name.tar.gz" --strip-components 1 -C "$place/$name.new"
    "$place/$name.new/bin/skep" --version >"$work/tried" 2>&1 || {
        rm -rf "$place/$name.new"
        rmdir "$place" 2>/dev/null || true
        fail "skep $version does not run on this system" "$(tail -n 1 "$work/tried")"
    }
    rm -rf "${place:?}/$name"
    mv "$place/$name.new" "$place/$name"
    # Otherwise every process of a node would compile the modules.
    "$place/$name/bin/python3" -I -m compileall -q -j 0 "$place/$name/lib" >/dev/null 2>&1 || true
    ln -sfn "$place/$name" "$place/current"
    ln -sf "$place/current/bin/skep" /usr/local/bin/skep
    if [ -d /run/systemd/system ]; then
        sed "s,/usr/bin/skep,/usr/local/bin/skep," "$place/current/share/skep.service" >"$unit"
        systemctl daemon-reload
        systemctl enable skep.service >/dev/null 2>&1
        # Containers run on while it restarts.
        systemctl restart skep.service
    else
        say "there is no systemd here: start the node with skep daemon"
    fi
    say "$(/usr/local/bin/skep --version) is installed in $place"
    next_step
}

# uninstall: keeps data and settings, as apt remove does.
uninstall() {
    if has dpkg-query && dpkg-query -W -f '${Status}' skep 2>/dev/null | grep -q ' installed$'; then
        DEBIAN_FRONTEND=noninteractive apt-get -q -y remove skep
    fi
    rm -f "$source" "/usr/share/keyrings/$keyring"
    if [ -d "$place" ]; then
        if [ -d /run/systemd/system ]; then
            systemctl disable --now skep.service >/dev/null 2>&1 || true
        fi
        PATH=$place/current/libexec/skep:$PATH "$place/current/libexec/skep/end-containers" || true
        rm -f "$unit"
        [ "$(readlink /usr/local/bin/skep 2>/dev/null)" != "$place/current/bin/skep" ] || rm -f /usr/local/bin/skep
        rm -rf "$place"
        [ ! -d /run/systemd/system ] || systemctl daemon-reload
    fi
    say "removed. Data (/var/lib/skep) and settings (/etc/skep) are still there"
}

# main: everything is read before anything runs, so that an interrupted download does nothing.
main() {
    while [ $# -gt 0 ]; do
        case $1 in
        --from | --version | --key) [ $# -gt 1 ] || fail "$1 needs a value" ;;
        esac
        case $1 in
        --from) from=${2%/} && shift ;;
        --version) version=$2 && shift ;;
        --key) fingerprint=$(printf %s "$2" | tr -d ' ' | tr a-f A-F) && shift ;;
        --allow-unsigned) is_unsigned_allowed=yes ;;
        --no-apt) is_apt_allowed= ;;
        --uninstall) action=uninstall ;;
        -h | --help) sed -n '2,/^set -eu/ { /^#/ s/^# \{0,1\}//p; }' "$0" && exit 0 ;;
        *) fail "$1 is no option" "see --help" ;;
        esac
        shift
    done
    [ "$(id -u)" = 0 ] || fail "this needs root" "run it with sudo"
    [ "$(uname -s)" = Linux ] || fail "Skep runs on Linux only, this is $(uname -s)"
    if [ "$action" = uninstall ]; then
        uninstall
        return
    fi
    [ -n "$from" ] || fail "where is the release?" "name its folder: --from ADDRESS"
    [ -n "$version" ] || fail "which version?" "name it: --version VERSION"
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    umask 022
    verify
    if [ -n "$is_apt_allowed" ] && has apt-get && has dpkg; then with_apt; else with_tarball; fi
}

main "$@"

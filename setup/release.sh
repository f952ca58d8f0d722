#!/bin/bash
# Makes everything that a release has, in dist/release-VERSION/: release.sh VERSION
# KEY names the key of gpg that signs it.  The same commit on the same machine gives the same bytes.
# ARCHES (amd64 arm64) names the processors.  The tarball for another one is made from packages of this machine's suite, on an
# emulated machine, which needs root and takes minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
. setup/say.sh
. setup/suite.sh
. setup/machine.sh
. setup/signing.sh

version=${1:?which version?}
target=$PWD/dist/release-$version
[ -z "$(git status --porcelain --untracked-files=no)" ] || say "files are changed: this is the release of no commit"
SOURCE_DATE_EPOCH=$(git log -1 --format=%ct)
export SOURCE_DATE_EPOCH
[ -z "${KEY:-}" ] || signing_key "$KEY" "$SOURCE_DATE_EPOCH" >/dev/null  # before the work of many minutes
native=$(dpkg --print-architecture)
arches=${ARCHES:-amd64 arm64}

# foreign_tarball ARCHITECTURE PACKAGE: makes the tarball on an emulated machine.
foreign_tarball() {
    local suite
    suite=$(. /etc/os-release && echo "$VERSION_CODENAME")
    say "making a machine of $1 with $suite, emulated"
    emulate "$1" "$work/emulator"
    ARCH=$1 make_system "$suite" "$work/$1" runc,conmon,nftables,iproute2,tini
    place_in_network "$work/$1"
    git clone -q . "$work/$1/root/skep"
    cp "$2" "$work/$1/root/"
    run_inside "$work/$1" "SOURCE_DATE_EPOCH=$SOURCE_DATE_EPOCH setup/portable.sh /root/${2##*/} /root/made" </dev/null
    cp "$work/$1/root/made"/*.tar.gz "$target/"
}

for one in $arches; do
    [ "$one" = "$native" ] || [ "$(id -u)" = 0 ] || fail "the tarball for $one needs root" "run it as root, or set ARCHES=$native"
done
work=$(mktemp -d /var/tmp/skep-release-XXXXXX)
trap 'stop_emulation; rm -rf --one-file-system "$work"' EXIT
rm -rf "$target"
for one in $arches; do
    ARCH=$one setup/package.sh "$target" "$version"
    package=$(echo "$target"/skep_*_"$one".deb)
    if [ "$one" = "$native" ]; then setup/portable.sh "$package" "$target"; else foreign_tarball "$one" "$package"; fi
done
say "building the documents' site"
NO_MKDOCS_2_WARNING=1 SKEP_RELEASE=$version .venv/bin/python -m mkdocs build --site-dir "$target/site"
setup/publish.sh "$target" "$version"
say "$(du -sm "$target" | cut -f 1) MiB in $target"

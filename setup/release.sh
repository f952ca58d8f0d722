#!/bin/bash
# Makes everything that a release has, in dist/release-VERSION/: release.sh VERSION
# KEY names the key of gpg that signs it.  The same commit on the same machine gives the same bytes.
set -euo pipefail
cd "$(dirname "$0")/.."
. setup/say.sh

version=${1:?which version?}
target=$PWD/dist/release-$version
[ -z "$(git status --porcelain --untracked-files=no)" ] || say "files are changed: this is the release of no commit"
SOURCE_DATE_EPOCH=$(git log -1 --format=%ct)
export SOURCE_DATE_EPOCH
rm -rf "$target"
setup/package.sh "$target" "$version"
for package in "$target"/*.deb; do setup/portable.sh "$package" "$target"; done
setup/publish.sh "$target" "$version"
say "$(du -sm "$target" | cut -f 1) MiB in $target"

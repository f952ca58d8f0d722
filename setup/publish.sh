#!/bin/bash
# Makes a folder that a web server can serve from a directory with packages: publish.sh DIRECTORY VERSION
#
# Adds the install script, release notes, the bill of materials, an apt repository (apt/), and SHA256SUMS.  KEY names a key of
# gpg, by which SHA256SUMS and the repository are signed.  The same input gives the same bytes.
set -euo pipefail
cd "$(dirname "$0")/.."
. setup/say.sh
. setup/signing.sh

target=$(realpath "${1:?which directory?}")
version=${2:?which version?}
python=${PYTHON:-.venv/bin/python}
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}
export SOURCE_DATE_EPOCH
keyring=skep-archive-keyring.gpg
fingerprint=
if [ -n "${KEY:-}" ]; then
    fingerprint=$(signing_key "$KEY" "$SOURCE_DATE_EPOCH")
fi

# sign OPTION INPUT OUTPUT
sign() {
    gpg --batch --yes --quiet --faked-system-time "$SOURCE_DATE_EPOCH!" --local-user "$fingerprint!" --digest-algo SHA512 \
        --armor "$1" --output "$3" "$2"
}

# sums DIRECTORY [FIND-ARGUMENTS...]: prints the checksum and name of each file in it.
sums() { (cd "$1" && shift && find . "$@" -type f -printf '%P\0' | sort -z | xargs -0 sha256sum); }

# packages_index: prints the index of the packages in the pool, which apt reads.
packages_index() {
    local package
    for package in "$target"/apt/pool/*.deb; do
        dpkg-deb -f "$package"
        printf 'Filename: pool/%s\nSize: %s\nSHA256: %s\n\n' "${package##*/}" "$(stat -c %s "$package")" \
            "$(sha256sum "$package" | cut -d ' ' -f 1)"
    done
}

# repository: makes the apt repository of all packages.
repository() {
    local dist=$target/apt/dists/stable architectures architecture
    rm -rf "$target/apt"
    mkdir -p "$target/apt/pool" "$dist"
    ln "$target"/*.deb "$target/apt/pool/"
    architectures=$(for one in "$target"/*.deb; do dpkg-deb -f "$one" Architecture; done | sort -u)
    packages_index >"$dist/all"
    for architecture in $architectures; do
        mkdir -p "$dist/main/binary-$architecture"
        awk -v RS= -v ORS='\n\n' -v wanted="Architecture: $architecture" '$0 ~ wanted' "$dist/all" \
            >"$dist/main/binary-$architecture/Packages"
        gzip -9nk "$dist/main/binary-$architecture/Packages"
    done
    rm "$dist/all"
    {
        printf 'Origin: Skep\nLabel: Skep\nSuite: stable\nCodename: stable\nComponents: main\nArchitectures: %s\nDate: %s\nSHA256:\n' \
            "${architectures//$'\n'/ }" "$(LC_ALL=C date -u -R -d "@$SOURCE_DATE_EPOCH")"
        sums "$dist/main" | while read -r sum file; do
            printf ' %s %s %s\n' "$sum" "$(stat -c %s "$dist/main/$file")" "main/$file"
        done
    } >"$work/Release"
    mv "$work/Release" "$dist/Release"
    if [ -n "$fingerprint" ]; then
        sign --clearsign "$dist/Release" "$dist/InRelease"
        sign --detach-sign "$dist/Release" "$dist/Release.gpg"
    fi
}

# notes: prints the version's section of the changelog, or what towncrier would write there.  Links lead to the site.
notes() {
    local date
    date=$(date -u -d "@$SOURCE_DATE_EPOCH" +%F)
    if grep -q "^## $version " CHANGELOG.md; then
        awk -v heading="## $version " 'index($0, "## ") == 1 { inside = index($0, heading) == 1 } inside' CHANGELOG.md |
            "$python" -m docs.site.released "$version" "$date"
    else
        "$python" -m towncrier build --draft --version "$version" --date "$date" 2>/dev/null
    fi | sed -E 's,\]\(docs/([^)#]*)\.md,](site/\1.html,g'
}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
umask 022
rm -f "$target"/{SHA256SUMS,SHA256SUMS.asc,"$keyring"}
notes >"$target/RELEASE-NOTES.md"
"$python" setup/sbom.py "$target" "$version" >"$target/skep-$version.cdx.json"
sed "s/^fingerprint=.*/fingerprint=$fingerprint/; s/^version=.*/version=$version/" packaging/install.sh >"$target/install.sh"
chmod 755 "$target/install.sh"
repository
[ -z "$fingerprint" ] || gpg --batch --export "$fingerprint" >"$target/$keyring"
sums "$target" -maxdepth 1 >"$work/SHA256SUMS"
mv "$work/SHA256SUMS" "$target/SHA256SUMS"
if [ -n "$fingerprint" ]; then
    sign --detach-sign "$target/SHA256SUMS" "$target/SHA256SUMS.asc"
    say "$target is signed by $fingerprint"
else
    say "$target is NOT signed: to sign it, name a key of gpg (make release VERSION=$version KEY=...)"
fi

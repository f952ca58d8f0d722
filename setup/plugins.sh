#!/bin/bash
# Places a current docker command (newest/docker), its plugins docker-buildx and docker-compose, and Ansible's collection
# community.docker in a directory: plugins.sh DIRECTORY
#
# They are unpacked from signed packages of a newer suite, as etcd is (etcd.sh), but not installed, because that would
# change the machine's docker command.  Only tests use them.  If they cannot be fetched, set-up continues
# without them and writes the reason to DIRECTORY/plugins-missing.  Those tests are skipped with that reason, and set-up
# tries again a day later.
set -euo pipefail
cd "$(dirname "$0")"
. ./say.sh
. ./suite.sh

target=$1
plugins="docker-buildx docker-compose"
collection=ansible_collections/community/docker
missing=$target/plugins-missing

# has_docker DIRECTORY: succeeds if it has docker 28.3 or newer, or if the distribution has no package with the command alone.
has_docker() {
    ! grep -q "^$(distribution) .* docker-cli," plugin-suites.txt ||
        at_least "$("$1/newest/docker" --version 2>/dev/null | sed -n 's/^Docker version \([0-9.]*\).*/\1/p')" 28.3
}

# works DIRECTORY: succeeds if it has plugins that run here (buildx 0.29, compose 2.40 or newer) and current modules.
works() {
    has_docker "$1" &&
    at_least "$(sed -n 's/^  "version": "\([0-9.]*\).*/\1/p' "$1/$collection/MANIFEST.json" 2>/dev/null)" 4.0 &&
    at_least "$("$1/docker-buildx" version 2>/dev/null | sed -n 's/^[^ ]* v\{0,1\}\([0-9.]*\).*/\1/p')" 0.29 &&
        at_least "$("$1/docker-compose" version --short 2>/dev/null | sed 's/^v//; s/[^0-9.].*//')" 2.40
}

# Set-up may run at every make, and then costs only a look at these files.
stamp=$target/plugins-placed
wanted=$(digest plugin-suites.txt)
if [ -x "$target/docker-buildx" ] && [ -x "$target/docker-compose" ] && [ -d "$target/$collection" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
    exit 0
fi
if works "$target"; then
    rm -f "$missing"
    printf '%s\n' "$wanted" >"$stamp"
    exit 0
fi
if [ -n "$(find "$missing" -mmin -1440 2>/dev/null)" ]; then
    exit 0
fi

# without REASON: continues set-up without the plugins.
without() {
    mkdir -p "$target"
    printf '%s\n' "$1" >"$missing"
    say "continuing without the docker command's plugins and Ansible's modules, which some tests need: $1"
    exit 0
}

command -v apt-get >/dev/null || without "there is no apt-get to fetch them with"
name=$(distribution)
read -r _ component keyring packages suites < <(grep "^$name " plugin-suites.txt) ||
    without "$name is not a distribution whose suites are known here"
keyring=/usr/share/keyrings/$keyring
[ -r "$keyring" ] || without "the keyring of $name is missing: $keyring"
mirror=$(archive_of "$component")
[ -n "$mirror" ] || without "apt has no archive with the component $component"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# unpack: fetches the packages with $suite_options and leaves the plugins in $work/found.
unpack() {
    rm -rf "$work"/*.deb "$work/unpacked" "$work/found"
    mkdir "$work/unpacked" "$work/found"
    # The options are words without blanks, meant to be split.
    # shellcheck disable=SC2086
    (cd "$work" && apt-get $suite_options -q download ${packages//,/ }) >"$work/log" 2>&1 || return 1
    local package plugin
    for package in "$work"/*.deb; do
        case ${package##*/} in
        # The package has a hundred collections, and one is used.
        ansible_*) dpkg-deb --fsys-tarfile "$package" | tar -x -C "$work/unpacked" --wildcards "*/$collection" ;;
        *) dpkg-deb -x "$package" "$work/unpacked" ;;
        esac
    done
    mkdir -p "$work/found/${collection%/*}"
    find "$work/unpacked" -type d -path "*/$collection" -exec cp -r {} "$work/found/$collection" \;
    mkdir "$work/found/newest"
    find "$work/unpacked" -type f -path "*/usr/bin/docker" -exec cp {} "$work/found/newest/docker" \;
    for plugin in $plugins; do
        find "$work/unpacked" -type f -path "*cli-plugins/$plugin" -exec cp {} "$work/found/$plugin" \;
    done
    works "$work/found" || { echo "its packages are older" >"$work/log" && return 1; }
}

for suite in $suites; do
    say "fetching the docker command's plugins from the suite $suite"
    if use_suite "$work" "$mirror" "$suite" "$component" "$keyring" >"$work/log" 2>&1 && unpack; then
        mkdir -p "$target/newest"
        for plugin in newest/docker $plugins; do
            [ -e "$work/found/$plugin" ] || continue
            install -m 0755 "$work/found/$plugin" "$target/$plugin.new"
            mv "$target/$plugin.new" "$target/$plugin"
        done
        rm -rf "${target:?}/${collection%%/*}"
        cp -r "$work/found/${collection%%/*}" "$target/"
        rm -f "$missing"
        printf '%s\n' "$wanted" >"$stamp"
        say "docker, docker-buildx, docker-compose and community.docker are in $target"
        exit 0
    fi
done
without "no suite of $name has them (tried: $suites): $(tail -n 1 "$work/log")"

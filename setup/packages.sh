#!/bin/bash
# Installs the missing packages of packages.txt: packages.sh PYTHON DIRECTORY [run|dev]
# (PYTHON: the interpreter whose modules are checked.  DIRECTORY: for commands that are only unpacked.)
set -euo pipefail
cd "$(dirname "$0")"
. ./say.sh

python=$1
target=$2
extent=${3:-run}
export DEBIAN_FRONTEND=noninteractive
PATH=$PATH:/usr/sbin:/sbin

present() {
    case $1 in
    unpacked:*) [ -x "$target/${1#unpacked:}" ] ;;
    *,*) present "${1%%,*}" || present "${1#*,}" ;;
    module:*) "$python" -c "import ${1#module:}" 2>/dev/null ;;
    # Unquoted: the pattern is expanded here; the first match has to exist.
    */*) set -- $1 && [ -e "$1" ] ;;
    *) command -v "$1" >/dev/null || [ -x "$target/$1" ] ;;
    esac
}

# is_known PACKAGE: succeeds if the archive has the package.
is_known() { grep -qxF "$1" <<<"$known"; }

# first_known PACKAGE...: prints the first package that the archive has, or the first of all (for the message).
first_known() {
    local package
    for package in "$@"; do
        ! is_known "$package" || { echo "$package" && return; }
    done
    echo "$1"
}

# first_released SUITE PACKAGE...: prints PACKAGE=VERSION of the first that the suite itself has, not only its updates.
# (For PACKAGE/SUITE apt installs an update if that has the same codename.)
first_released() {
    local suite=$1 package version
    shift
    for package in "$@"; do
        version=$(apt-cache madison "$package" 2>/dev/null | awk -v place=" $suite/" 'index($0, place) { print $3; exit }')
        if [ -n "$version" ]; then
            echo "$package=$version"
            return
        fi
    done
    echo "$1"
}

# install_packages PACKAGE...
install_packages() {
    apt-get -q -y -o DPkg::Lock::Timeout=120 install --no-install-recommends "$@" </dev/null
}

# libraries_of FILE: prints the missing library packages that a package depends on.
libraries_of() {
    local name
    for name in $(dpkg-deb -f "$1" Depends | tr ',' '\n' | awk '$1 ~ /^(lib|zlib)/ { print $1 }'); do
        dpkg-query -W -f '${Status}' "$name" 2>/dev/null | grep -q 'ok installed' || echo "$name"
    done
}

# take_out COMMAND PLACE PACKAGE: unpacks only the command to a place below the target, without installing its package.
# The libraries that it needs are installed.
take_out() {
    local work libraries place=$target/$2
    work=$(mktemp -d)
    {
        (cd "$work" && apt-get -q -o APT::Sandbox::User=root download "$3" && dpkg-deb -x ./*.deb unpacked) >&2 &&
            libraries=$(libraries_of "$work"/*.deb) &&
            # The names are words, meant to be split.
            # shellcheck disable=SC2086
            { [ -z "$libraries" ] || install_packages $libraries >&2; } &&
            mkdir -p "${place%/*}" &&
            install -m 0755 "$work"/unpacked/usr/*bin/"$1" "$place.new" &&
            mv "$place.new" "$place"
    } || {
        rm -rf "$work"
        return 1
    }
    rm -rf "$work"
}

missing=()
while IFS='|' read -r what packages how only; do
    what=${what// /} only=${only// /}
    [ -z "$only" ] || [ "$extent" = dev ] || continue
    present "$what" || missing+=("$what|$packages|${how// /}|$only")
done < <(grep -v -e '^#' -e '^$' packages.txt)
[ ${#missing[@]} -gt 0 ] || exit 0

names=$(printf '%s\n' "${missing[@]}" | cut -d '|' -f 1 | sed 's/^unpacked://' | tr '\n' ' ')
command -v apt-get >/dev/null || fail "missing: $names" \
    "there is no apt-get here: install them in this system's way, then run make again"
if [ "$(id -u)" != 0 ]; then
    fail "missing: $names" "run it once as root (sudo make setup), or install the packages:" \
        "sudo apt-get install $(printf '%s\n' "${missing[@]}" | cut -d '|' -f 2 | awk '{ print $1 }' | tr '\n' ' ')"
fi

say "missing: $names- asking apt"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
apt-get -q update </dev/null >"$log" 2>&1 || {
    cat "$log" >&2
    fail "apt-get update failed (above)" "check the machine's way to its package mirror, then run make again"
}

# apt shows nothing for virtual packages.  One call, because a small machine takes seconds for each.
# shellcheck disable=SC2046
known=$(apt-cache show --no-all-versions $(printf '%s\n' "${missing[@]}" | cut -d '|' -f 2) 2>/dev/null |
    sed -n 's/^Package: //p') || true

install=()
unpack=()
for line in "${missing[@]}"; do
    IFS='|' read -r what packages how only <<<"$line"
    # The packages are words, meant to be split.
    # shellcheck disable=SC2086
    package=$(first_known $packages)
    if [ "$only" = skipped ] && ! is_known "$package"; then
        say "this system has no package $package, so tests of $what are skipped"
        continue
    fi
    case $how in
    unpack) unpack+=("${what#unpacked:} $package") ;;
    release)
        suite=$(. /etc/os-release && echo "$VERSION_CODENAME")
        # shellcheck disable=SC2086
        unpack+=("${what#unpacked:} $(first_released "$suite" $packages)")
        ;;
    *) install+=("$package") ;;
    esac
done

if [ ${#install[@]} -gt 0 ]; then
    say "installing ${install[*]}"
    install_packages "${install[@]}" >"$log" 2>&1 || {
        cat "$log" >&2
        fail "apt-get install failed (above): ${install[*]}" "repair what apt complains about, then run make again"
    }
fi
for line in "${unpack[@]}"; do
    read -r what package <<<"$line"
    say "taking ${what##*/} out of the package $package"
    take_out "${what##*/}" "$what" "$package" 2>"$log" || {
        cat "$log" >&2
        fail "$what could not be taken out of $package (above)" "install a $what command yourself, then run make again"
    }
done

for line in "${missing[@]}"; do
    what=${line%%|*}
    present "$what" || [ "${line##*|}" = skipped ] || fail "still missing after the installation: $what" "expected in the package(s)$(cut -d '|' -f 2 <<<"$line")"
done

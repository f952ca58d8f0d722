#!/bin/bash
# Builds the wheel and the Debian package of the current commit: package.sh DIRECTORY [VERSION]
# Both get the version of the tag (git describe), or VERSION.  Needs .venv (setup.sh run).
#
# The package works on every suite whose Python is in $pythons: its environment has a directory of compiled packages for each
# Python, and one for the packages that all share.  pip fetches them for all Pythons, checked against the lock file.
# package.sh --own DIRECTORY [VERSION] only leaves the package's tree there, without fetched parts (libraries, etcd).
# ARCH=arm64 builds for another processor.  Nothing of the package is compiled here, so no emulator is needed.
set -euo pipefail
cd "$(dirname "$0")/.."
. setup/say.sh

pythons="3.11 3.12 3.13 3.14" # bookworm, noble, trixie, resolute
glibc="_2_34 _2_28 _2_17 2014" # of bookworm and later; the last is an older name of 2.17

is_own=
[ "${1:-}" != --own ] || { is_own=yes && shift; }
target=$(realpath -m "${1:?which directory?}")
venv=$PWD/.venv
prefix=/usr/lib/skep
native=$(dpkg --print-architecture)
architecture=${ARCH:-$native}
case $architecture in
amd64) processor=x86_64 ;;
arm64) processor=aarch64 ;;
*) fail "no packages are built for $architecture" "amd64 or arm64" ;;
esac

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
umask 022
. setup/pack.sh

# tagged_version: prints 1.2.0 for tag v1.2.0, 1.2.0+4.gabc1234 four commits later, or the code's version without a tag.
tagged_version() {
    local described
    if described=$(git describe --tags --match 'v[0-9]*' 2>/dev/null); then
        sed -E 's/^v//; s/-([0-9]+)-(g[0-9a-f]+)$/+\1.\2/' <<<"$described"
    else
        sed -n 's/^__version__ = "\(.*\)"/\1/p' skep/__init__.py
    fi
}

# Debian sorts a suffix that begins with ~ before the version without it, as a pre-release needs.  Otherwise all three versions
# are the same, because skep upgrade waits for nodes that show the package's version.  A commit's suffix follows +.
given=${2:-}
version=$(sed -E 's/^([^+a-z]*[0-9])[-.]?(a|b|rc|dev)\.?([0-9]+)/\1~\2\3/' <<<"${given:-$(tagged_version)}")
debian_version=$version
version=${version/"~"/}
case $version in
[0-9]*) ;;
*) fail "$version is no version: it begins with a number" "name the tag v1.2.0" ;;
esac
SOURCE_DATE_EPOCH=$(git log -1 --format=%ct)
export SOURCE_DATE_EPOCH

# put MODE SOURCE PATH: adds a file to the package.
put() { install -D -m "$1" "$2" "$root$3"; }

# source_tree DIRECTORY: copies the tracked files in their current state, with the version in them.
source_tree() {
    local tree name
    tree=$(git stash create) # nothing, if nothing is changed
    mkdir "$1"
    git archive "${tree:-HEAD}" | tar -x -C "$1"
    sed -i -e "s/^__version__ = .*/__version__ = \"$version\"/" \
        -e "s/^__commit__ = .*/__commit__ = \"$(git log -1 --format=%h)\"/" \
        -e "s/^__date__ = .*/__date__ = \"$(git log -1 --format=%cs)\"/" "$1/skep/__init__.py"
    [ -n "$given" ] || return 0 # not a release
    for name in CHANGELOG.md README.md; do
        "$venv/bin/python" -m docs.site.released "$version" "$(git log -1 --format=%cs)" <"$name" >"$1/$name"
    done
}

# environment: creates a virtual environment for any version of the machine's python3, which finds its libraries by version.
environment() {
    local python
    mkdir -p "$root$prefix"/{bin,lib/shared}
    ln -s /usr/bin/python3 "$root$prefix/bin/python"
    printf 'home = /usr/bin\ninclude-system-site-packages = false\n' >"$root$prefix/pyvenv.cfg"
    for python in $pythons; do
        mkdir -p "$root$prefix/lib/python$python/site-packages"
        echo "$prefix/lib/shared" >"$root$prefix/lib/python$python/site-packages/shared.pth"
    done
    cat >"$work/skep" <<EOF
#!$prefix/bin/python -I
from skep.cli.main import main

main()
EOF
    put 755 "$work/skep" "$prefix/bin/skep"
    mkdir -p "$root/usr/bin"
    ln -s "../lib/skep/bin/skep" "$root/usr/bin/skep"
}

# own_files SOURCES: adds Skep's own files.
own_files() {
    local shell
    cp -r "$1/skep" "$root$prefix/lib/shared/skep"
    put 755 packaging/debian/end-containers "$prefix/libexec/skep/end-containers"
    sed 's,/usr/local/bin/skep,/usr/bin/skep,; s,^# systemd unit.*,# systemd unit of a node.,' packaging/skep.service >"$work/skep.service"
    put 644 "$work/skep.service" /usr/lib/systemd/system/skep.service
    sed 's,/usr/local/bin/skep,/usr/bin/skep,' packaging/skep-rootless.service >"$work/skep-rootless.service"
    put 644 "$work/skep-rootless.service" /usr/lib/systemd/user/skep.service
    put 644 packaging/debian/skep.toml /etc/skep/skep.toml
    for shell in bash zsh fish; do
        (cd "$1" && "$venv/bin/python" -c 'from skep.cli.main import main; main(prog_name="skep")' completion $shell) >"$work/$shell"
    done
    put 644 "$work/bash" /usr/share/bash-completion/completions/skep
    put 644 "$work/zsh" /usr/share/zsh/vendor-completions/_skep
    put 644 "$work/fish" /usr/share/fish/vendor_completions.d/skep.fish
    gzip -9n <packaging/skep.1 >"$work/skep.1.gz"
    put 644 "$work/skep.1.gz" /usr/share/man/man1/skep.1.gz
    gzip -9n <"$1/CHANGELOG.md" >"$work/changelog.gz"
    put 644 "$work/changelog.gz" /usr/share/doc/skep/changelog.gz
    put 644 packaging/debian/copyright /usr/share/doc/skep/copyright
    put 644 packaging/selinux/skep.cil /usr/share/skep/skep.cil
    put 644 packaging/prometheus/prometheus.yml /usr/share/skep/prometheus.yml
    put 644 packaging/prometheus/skep-alerts.yml /usr/share/skep/skep-alerts.yml
    put 644 packaging/grafana/skep.json /usr/share/skep/skep.json
}

# libraries: adds the locked packages, once per Python if they have compiled code, otherwise once.
libraries() {
    local pip=("$venv/bin/python" -m pip --disable-pip-version-check --quiet) python wheel one options
    # The built package does not need build tools.
    sed '/^setuptools==/,$d' setup/requirements.lock >"$work/lock"
    for python in $pythons; do
        options=(--no-deps --only-binary :all: --implementation cp --python-version "$python")
        for one in $glibc; do options+=(--platform "manylinux${one}_$processor"); done
        "${pip[@]}" download "${options[@]}" --require-hashes --requirement "$work/lock" --dest "$work/wheels-$python" </dev/null ||
            fail "pip cannot fetch the packages for Python $python (above)" "check the machine's way to its Python package index"
        mkdir -p "$work/wheels-shared"
        for wheel in "$work/wheels-$python"/*.whl; do
            case $wheel in *-none-any.whl | *-abi3-*) mv "$wheel" "$work/wheels-shared" ;; esac
        done
        "${pip[@]}" install "${options[@]}" --no-compile --no-index --target "$work/python$python" "$work/wheels-$python"/*.whl </dev/null
        cp -r "$work/python$python/." "$root$prefix/lib/python$python/site-packages"
    done
    "${pip[@]}" install "${options[@]}" --no-compile --no-index --target "$work/shared" "$work/wheels-shared"/*.whl </dev/null
    # zstandard's second implementation, for interpreters other than CPython, is a quarter of the package's size.
    rm -rf "$work/shared/bin" "$root$prefix"/lib/python*/site-packages/{bin,zstandard/_cffi.*}
    cp -r "$work/shared/." "$root$prefix/lib/shared"
    # pip's records name the temporary directory of this build, so every build would be different.
    find "$root$prefix/lib" \( -name direct_url.json -o -path '*.dist-info/RECORD' \) -delete
}

# etcd_programs: adds etcd (decision 2), so that an upgrade of the machine does not change its version.
etcd_programs() {
    local name from=$venv/libexec/skep
    [ "$architecture" = "$native" ] || from=$work/etcd
    setup/etcd.sh "$from" "$architecture"
    for name in etcd etcdctl etcdutl; do
        put 755 "$from/$name" "$prefix/libexec/skep/$name"
    done
}

# control_files: writes the files that dpkg reads.
control_files() {
    local script size
    mkdir "$root/DEBIAN"
    for script in postinst prerm postrm; do
        install -m 755 "packaging/debian/$script" "$root/DEBIAN/$script"
    done
    (cd "$root" && find etc -type f -printf '/%p\n' | sort) >"$root/DEBIAN/conffiles"
    (cd "$root" && find . -type f -not -path './DEBIAN/*' -printf '%P\0' | sort -z | xargs -0 md5sum) >"$root/DEBIAN/md5sums"
    size=$(du -sk --apparent-size "$root" | cut -f 1)
    sed -e "s/@VERSION@/$debian_version/; s/@ARCHITECTURE@/$architecture/; s/@SIZE@/$size/" \
        -e "s/@PYTHON_MIN@/${pythons%% *}/; s/@PYTHON_BELOW@/3.$((${pythons##*.} + 1))/" packaging/debian/control >"$root/DEBIAN/control"
}

# source_distribution SOURCES: adds the sdist, packed again, because setuptools writes the current time into it.
source_distribution() {
    local name=skep_orchestrator-$version
    (cd "$1" && "$venv/bin/python" -c 'from setuptools import build_meta; build_meta.build_sdist("..")') >/dev/null
    mkdir "$work/sdist"
    tar -x -f "$work/$name.tar.gz" -C "$work/sdist"
    pack "$work/sdist" "$name" >"$target/$name.tar.gz"
}

root=$work/root
mkdir "$root"
[ -n "$is_own" ] || say "building version $version"
source_tree "$work/sources"
environment
own_files "$work/sources"
if [ -n "$is_own" ]; then
    control_files
    mkdir -p "$target"
    cp -a "$root/." "$target"
    exit 0
fi
libraries
etcd_programs
control_files
find "$root" -depth -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +
mkdir -p "$target"
"$venv/bin/python" -m pip --disable-pip-version-check --quiet wheel --no-index --no-build-isolation --no-deps \
    --wheel-dir "$target" "$work/sources" </dev/null
source_distribution "$work/sources"
package=$target/skep_${debian_version}_$architecture.deb
dpkg-deb --root-owner-group -Zzstd -z12 --build "$root" "$package" >/dev/null
say "built $package, $(du -m "$package" | cut -f 1) MiB"

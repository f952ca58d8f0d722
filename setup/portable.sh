#!/bin/bash
# Builds the relocatable tarball from a Debian package: portable.sh PACKAGE DIRECTORY
#
# It has its own Python, runc, conmon, etcd, nft and ip, copied from the packages that are installed on this machine, with
# their libraries.  Executables find the libraries by $ORIGIN, so that the directory may lie anywhere.  The C library and its
# loader are those of the target: programs of a distribution run with the C library of that distribution or a newer one.
# share/doc/skep/bundled.txt names each package with its version.
set -euo pipefail
cd "$(dirname "$0")/.."
. setup/say.sh
. setup/pack.sh

package=$(realpath "${1:?which package?}")
target=$(realpath -m "${2:?which directory?}")
version=$(dpkg-deb -f "$package" Version | tr -d '~')
name=skep-$version-linux-$(uname -m)
glibc='/(ld-linux[^/]*|lib(c|m|dl|pthread|rt|resolv|util|nss_[a-z]+|anl|mvec|thread_db))\.so\.[0-9]+$'
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}
export SOURCE_DATE_EPOCH
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
umask 022
root=$work/$name
mkdir -p "$root"/{bin,lib,libexec/skep,share/doc/skep,share/man/man1}

interpreter=$(readlink -f /usr/bin/python3)
python=${interpreter##*/} # python3.11
dpkg -S "$interpreter" >/dev/null 2>&1 || fail "$interpreter is from no package" "apt-get install python3"
if ! command -v patchelf >/dev/null; then
    (cd "$work" && apt-get -o APT::Sandbox::User=root -q download patchelf >&2 && dpkg-deb -x patchelf_*.deb tools)
    PATH=$work/tools/usr/bin:$PATH
fi

# note FILE: remembers the package of a copied file.  Merged directories have two names, of which dpkg knows one.
note() {
    local file owner
    file=$(readlink -f "$1")
    owner=$(dpkg -S "$file" 2>/dev/null || dpkg -S "${file#/usr}" 2>/dev/null) || fail "$file is from no package" "install its package"
    echo "${owner%%: *}" >>"$work/packages"
}

# program NAME PATH: adds an executable that finds its libraries beside itself.  RPATH also serves libraries of libraries.
program() {
    local found
    found=$(PATH=$PATH:/usr/sbin:/sbin command -v "$1") || fail "$1 is missing" "setup/setup.sh run"
    note "$found"
    install -m 755 "$(readlink -f "$found")" "$root/$2"
    # A static program has no interpreter.
    ! patchelf --print-interpreter "$root/$2" >/dev/null 2>&1 || patchelf --force-rpath --set-rpath '$ORIGIN/'"$3" "$root/$2"
}

# libraries: adds the libraries of all executables and modules, except the C library's.
libraries() {
    local library
    # ldd fails for scripts and static programs.
    { find "$root" -type f \( -perm /100 -o -name '*.so*' \) -exec ldd {} + 2>/dev/null || true; } |
        awk '$2 == "=>" && $3 ~ /^\// { print $3 }' | sort -u >"$work/libraries"
    grep -E -v "$glibc" "$work/libraries" | while read -r library; do
        case $library in "$root"/*) continue ;; esac
        [ ! -e "$root/lib/${library##*/}" ] || continue
        note "$library"
        install -m 644 "$(readlink -f "$library")" "$root/lib/${library##*/}"
    done
}

dpkg-deb -x "$package" "$work/package"
from=$work/package/usr
program "$interpreter" "bin/$python" ../lib
ln -s "$python" "$root/bin/python3"
cp -rL "/usr/lib/$python" "$root/lib/$python" 2>/dev/null || true # links into /etc may lead nowhere
rm -rf "$root/lib/$python"/{test,idlelib,lib2to3,ensurepip,turtledemo,distutils,dist-packages,config-*,sitecustomize.py,EXTERNALLY-MANAGED}
find "$root/lib/$python" -name __pycache__ -prune -exec rm -rf {} +
mkdir -p "$root/lib/python3"
cp -r "$from/lib/skep/lib/shared" "$root/lib/python3/dist-packages" # where a distribution's Python looks
cp -r "$from/lib/skep/lib/$python/site-packages/." "$root/lib/python3/dist-packages"
rm "$root/lib/python3/dist-packages/shared.pth"
find "$root/lib/python3" -name __pycache__ -prune -exec rm -rf {} +
cp "$from/lib/skep/libexec/skep"/* "$root/libexec/skep"
for one in runc conmon nft ip tini-static; do program $one "libexec/skep/$one" ../../lib; done
libraries
note "/usr/lib/$python/os.py"
note "/usr/lib/$python/json/__init__.py"
# shellcheck disable=SC2046
dpkg-query -W -f '${Package} ${Version} ${Architecture}\n' $(sort -u "$work/packages") | sort -u >"$root/share/doc/skep/bundled.txt"
"$root/libexec/skep/etcd" --version | sed -n 's/^etcd Version: /etcd /p' >>"$root/share/doc/skep/bundled.txt"
sed -n 's/.*(\(.*\)).*/\1/p' <<<"$(ldd --version | head -n 1)" | sed 's/^.*GLIBC \([0-9.]*\).*/\1/' >"$root/share/doc/skep/glibc.txt"
# The licenses of what was copied.
cut -d ' ' -f 1 "$root/share/doc/skep/bundled.txt" | while read -r one; do
    [ ! -e "/usr/share/doc/$one/copyright" ] || install -D -m 644 "/usr/share/doc/$one/copyright" "$root/share/doc/skep/licenses/$one"
done

cp LICENSE "$root/share/doc/skep/"
cp "$from/share/man/man1/skep.1.gz" "$root/share/man/man1/"
cp -r "$from/share/bash-completion" "$from/share/skep" "$root/share/"
cp "$from/lib/systemd/system/skep.service" "$root/share/skep.service"
install -m 755 packaging/portable-skep "$root/bin/skep"

mkdir -p "$target"
pack "$work" "$name" >"$target/$name.tar.gz"
say "built $target/$name.tar.gz, $(du -m "$target/$name.tar.gz" | cut -f 1) MiB"

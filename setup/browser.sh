#!/bin/bash
# Installs Chromium, in which tests drive the dashboard, and the font of its pictures: browser.sh DIRECTORY
#
# Only tests use it, and not every distribution has it as a package (Ubuntu's is a snap).  If it cannot be installed, set-up
# continues without it and writes the reason to DIRECTORY/browser-missing.  Those tests are skipped with that reason, and
# set-up tries again a day later.
set -euo pipefail
cd "$(dirname "$0")"
. ./say.sh
. ./suite.sh

target=$1
missing=$target/browser-missing
log=$(mktemp)
trap 'rm -f "$log"' EXIT

if command -v chromium >/dev/null; then
    rm -f "$missing"
    exit 0
fi
needs_root="only root can install it (sudo make setup)"
is_root=
[ "$(id -u)" != 0 ] || is_root=yes
# Try again as root if the last attempt failed because the user was not root.
if [ -n "$(find "$missing" -mmin -1440 2>/dev/null)" ] && { [ -z "$is_root" ] || [ "$(cat "$missing")" != "$needs_root" ]; }; then
    exit 0
fi

# without REASON: continues set-up without Chromium.
without() {
    mkdir -p "$target"
    printf '%s\n' "$1" >"$missing"
    say "continuing without Chromium, which the dashboard's tests need: $1"
    exit 0
}

command -v apt-get >/dev/null || without "there is no apt-get to install it with"
[ -n "$is_root" ] || without "$needs_root"
[ "$(distribution)" = debian ] || without "the package of this distribution is no browser of its own (Debian's is)"
say "installing chromium, in which tests drive the dashboard"
export DEBIAN_FRONTEND=noninteractive
timeout 120 apt-get -q -o Acquire::Retries=0 update </dev/null >"$log" 2>&1 || without "apt-get update failed: $(tail -n 1 "$log")"
apt-get -q -y -o DPkg::Lock::Timeout=120 install --no-install-recommends chromium fonts-inter </dev/null >"$log" 2>&1 ||
    without "apt-get install failed: $(tail -n 1 "$log")"
rm -f "$missing"

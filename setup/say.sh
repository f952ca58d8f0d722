# Sourced by the other scripts: how set-up speaks, fails, and remembers what is done.

say() { printf 'setup: %s\n' "$*" >&2; }

# fail WHAT HOW: what is missing, and how to get it.
fail() {
    printf 'setup: %s\n' "$1" >&2
    shift
    printf '       %s\n' "$@" >&2
    exit 1
}

# at_least VERSION WANTED: dotted versions, compared number by number.
at_least() { [ "$(printf '%s\n%s\n' "$2" "$1" | sort -V | head -n 1)" = "$2" ]; }

# digest FILE...: one word that changes whenever one of the files does.
digest() { cat "$@" | sha256sum | cut -d ' ' -f 1; }

# The identity of the distribution: debian 12, ubuntu 24.04, ...
distribution() { (. /etc/os-release && printf '%s\n' "${ID:-unknown}"); }

# Sourced by the other scripts: messages, errors, and helpers to skip finished steps.

say() { printf 'setup: %s\n' "$*" >&2; }

# fail PROBLEM REMEDY...: prints the problem and its remedies, and exits.
fail() {
    printf 'setup: %s\n' "$1" >&2
    shift
    printf '       %s\n' "$@" >&2
    exit 1
}

# at_least VERSION WANTED: compares dotted versions number by number.
at_least() { [ "$(printf '%s\n%s\n' "$2" "$1" | sort -V | head -n 1)" = "$2" ]; }

# digest FILE...: prints one word that changes whenever one of the files changes.
digest() { cat "$@" | sha256sum | cut -d ' ' -f 1; }

# distribution: prints the distribution's ID.
distribution() { (. /etc/os-release && printf '%s\n' "${ID:-unknown}"); }

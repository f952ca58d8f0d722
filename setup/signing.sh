# Sourced by the scripts that make a release: the key of gpg that signs it.

# signing_key KEY EPOCH: prints the fingerprint of the secret key, or fails.  It signs at the commit's time, EPOCH, because a
# signature contains its time, and gpg refuses to sign at a time before the key was made.
signing_key() {
    local fingerprint made
    fingerprint=$(gpg --batch --with-colons --list-secret-keys "$1" 2>/dev/null | awk -F : '$1 == "fpr" { print $10; exit }') || true
    [ -n "$fingerprint" ] || fail "gpg has no secret key $1" "name one of gpg --list-secret-keys"
    made=$(gpg --batch --with-colons --list-secret-keys "$fingerprint" | awk -F : '$1 == "sec" { print $6; exit }')
    [ "$made" -le "$2" ] || fail "the key $1 is younger than the commit, at whose time it would sign" \
        "name an older key, or make the release of a later commit"
    printf '%s\n' "$fingerprint"
}

#!/bin/bash
# Builds the image of the playground with the docker command: image.sh TAG [SUITE]
# Creates a system of that suite (bookworm or trixie) with a fresh clone of the current commit, as setup/bare.sh does, and
# sets it up.  So the image consists of the distribution's packages, and no registry is needed.  Needs root and debootstrap.
set -euo pipefail
cd "$(dirname "$0")/.."
. setup/say.sh
. setup/suite.sh
. setup/machine.sh

tag=${1:?which tag?}
suite=${2:-bookworm}
[ "$(id -u)" = 0 ] || fail "this needs root" "run it as root"
docker=$(command -v docker || echo .venv/bin/docker)
"$docker" version >/dev/null || fail "no engine answers (above)" "set DOCKER_HOST to a Docker Engine or to a node of Skep"

place=$(mktemp -d /var/tmp/skep-image-XXXXXX)
trap 'rm -rf --one-file-system "$place"' EXIT
say "$suite: making a system with Skep, commit $(git rev-parse --short HEAD)"
make_machine "$suite" "$place/machine"
run_inside "$place/machine" "make setup-run && .venv/bin/python -m compileall -q skep .venv/lib &&
    .venv/bin/python -m skep.playground.images.nginx >/root/nginx.tar" </dev/null
rm -rf "$place/machine"/{var/lib/apt/lists,var/cache/apt,root/skep/.git,usr/share/doc,usr/share/man,usr/share/locale}
# The settings of this machine's network are not the user's.
rm -f "$place/machine"/etc/{resolv.conf,pip.conf}
(cd "$place/machine/etc/apt/apt.conf.d" && comm -12 <(ls) <(ls /etc/apt/apt.conf.d) | xargs -r rm -f)
tar -C "$place/machine" --one-file-system --numeric-owner -cf "$place/root.tar" .
rm -rf "$place/machine"
cp packaging/playground/Dockerfile "$place"
say "building $tag from $(du -m "$place/root.tar" | cut -f 1) MiB"
"$docker" build -q -t "$tag" "$place"

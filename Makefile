# Every target does its own set-up first; the second time that takes a moment.
# `make` alone lists the targets.

SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
# Images of containers set this.  Then each of the many processes that the tests start compiles every module again.
unexport PYTHONDONTWRITEBYTECODE
BIN := .venv/bin
PYTEST := $(BIN)/pytest -q
# Most tests wait for something most of the time. Files stay whole: their tests share a cluster. Their order is that of
# tests/support/harness/order.py.
WORKERS ?= 4
BESIDE_EACH_OTHER = -n $(WORKERS) --dist loadfile --no-loadscope-reorder
# What a busy machine did not do in time, and any failure of real processes, is tried once more; the first failure is shown at the
# end (decisions 29 and 80).
IN_TIME_AT_LAST = --reruns 1 --only-rerun 'Timeout|not within|in time' --rerun-show-tracebacks -rfER
# Images are layered by overlay mounts, which cannot lie on an overlay themselves (inside a container).
DEMO_DIR ?= $(if $(filter overlayfs,$(shell stat -f -c %T /var/tmp)),/dev/shm,/var/tmp)/skep-demo
DEMO_NAME ?= demo
PREFIX ?= /usr/local

STAMP = $(shell date -u +%Y-%m-%d-%H%M)-$(shell git rev-parse --short HEAD)
SUITE ?= bookworm
# kept(NAME): shows the output and keeps it, without the place of this checkout.
kept = 2>&1 | sed -u 's,$(CURDIR),CLONE,g' | tee bench/results/$(1)-$(STAMP).log
# What depends on the kernel: its cgroups, AppArmor, file systems.
VIRTUAL_TESTS ?= $(addprefix tests/integration/node/test_,container_surroundings.py container_life.py cgroup_parents.py \
                   survival_of_containers.py cgroup_v2.py apparmor.py escapes.py escapes_beside_docker.py \
                   trees_with_mounts.py encrypted_kernel.py network_volumes.py) tests/unit/linux/test_trees.py tests/unit/engine/test_apparmor.py

.DEFAULT_GOAL := help
.PHONY: help announce setup setup-run demo demo-down image install check types lint test unit rules contract component sim mutants conformance integration escapes soak day bench bench-networks bench-builds bench-around bench-page bare emulated virtual virtual-cluster package release bare-package bare-release bare-cluster reference site lock

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | column -t -s '|'

setup: ## make or repair the environment: packages, etcd, .venv (then: .venv/bin/skep)
	@setup/setup.sh dev

setup-run:
	@setup/setup.sh run

demo: setup-run ## a cluster on this machine with a service to play with
	@$(BIN)/skep playground demo --dir $(DEMO_DIR) --name $(DEMO_NAME)

demo-down: setup-run ## remove everything that the demo made
	@$(BIN)/skep playground down --dir $(DEMO_DIR) --name $(DEMO_NAME)

image: ## the playground as an image, by the engine of DOCKER_HOST (TAG=, SUITE=bookworm)
	@setup/image.sh $(or $(TAG),skep-playground) $(SUITE)

install: setup-run ## link the command into /usr/local/bin, install unit and man page (PREFIX=, DESTDIR=)
	@install -d $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(PREFIX)/share/man/man1 $(DESTDIR)/etc/systemd/system
	@ln -sfn $(CURDIR)/$(BIN)/skep $(DESTDIR)$(PREFIX)/bin/skep
	@install -m 644 packaging/skep.1 $(DESTDIR)$(PREFIX)/share/man/man1/skep.1
	@sed 's,/usr/local/bin/skep,$(PREFIX)/bin/skep,' packaging/skep.service >$(DESTDIR)/etc/systemd/system/skep.service

check: setup ## format, lint, types, import contracts, wording, imports of tests
	@$(MAKE) --no-print-directory --jobs 3 --output-sync types lint collected

types: # mypy uses one processor, so the other checks run beside it
	@$(BIN)/mypy
	@$(BIN)/mypy --config-file tests/mypy.ini

lint:
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/lint-imports
	@$(BIN)/python -m docs.voice

collected: # every test can be imported. In a fresh clone, each worker of the tests would compile all files otherwise
	@$(PYTEST) --collect-only -q | sed '/: [0-9]*$$/d; /^$$/d'

test: announce check ## check, then all tests that are not slow (what the continuous integration runs), 25 minutes
	@echo 'Part 2 of 2: tests'
	@$(PYTEST) --whole -m 'not slow' $(BESIDE_EACH_OTHER) $(IN_TIME_AT_LAST) --durations 15

announce: # what make test is about to do.  Its times are those of the bare machines in bench/results/
	@printf '%s\n' \
	  "make test takes about 25 minutes on two processors. This machine has $$(nproc)." \
	  'Part 1 of 2: make check, about one minute: format, lint, types, imports, wording' \
	  'Part 2 of 2: over 22,000 tests, many of them on real clusters; each line ends with the share that has run' \
	  'For a quick answer use make check, make rules and make unit (over 12,000 tests without clusters, two minutes).'

# These tests use processors and wait for little. Each worker collects all tests first, so more workers make them slower.
# They try a fifth of the examples of each property.
unit: setup ## tests without processes or clusters that are not slow, under two minutes on two processors
	@$(PYTEST) tests/unit -m 'not slow' --hypothesis-profile quick -n $(shell nproc) --dist loadfile --no-loadscope-reorder

rules: setup ## tests of the structure of the code, of the documents, and of the site, about half a minute
	@$(PYTEST) tests/test_*.py -m 'not slow' -n $(shell nproc) --dist loadfile

contract: setup ## one suite per interface, on each of its implementations (store, executors)
	@$(PYTEST) tests/contract

component: setup ## one part with its real neighbors
	@$(PYTEST) tests/component

sim: setup ## simulated clusters on virtual time; SEEDS=10000 for more seeds, SEED=7 for one with its events
	@$(BIN)/python -m sim $(if $(SEED),$(SEED),--seeds $(or $(SEEDS),500))

mutants: setup ## break named rules one at a time; the simulation must find each within 200 seeds
	@$(BIN)/python -m sim.mutants
	@$(BIN)/python -m sim.containers.mutants

conformance: setup ## the API as docker, docker-py and a recorded engine see it
	@$(PYTEST) tests/conformance

integration: setup ## every test, the slow ones too (real runc, etcd, nftables); log kept in bench/results/
	@mkdir -p bench/results
	@$(PYTEST) --whole $(BESIDE_EACH_OTHER) $(IN_TIME_AT_LAST) --durations 20 $(call kept,integration)

escapes: setup ## ways out of a container, tried in Skep's and in a Docker Engine's; table kept in bench/results/
	@mkdir -p bench/results
	@$(PYTEST) -s tests/integration/node/test_escapes_beside_docker.py $(call kept,escapes)

soak: setup ## an hour of load and faults on 3 managers and 3 workers (MINUTES=120); log kept in bench/results/
	@$(BIN)/python -m bench.soak --minutes $(or $(MINUTES),60)

day: setup ## two hours of ten stacks under load, upgrade and faults on 3 managers and 5 workers (MINUTES=10); a page in bench/results/
	@$(BIN)/python -m bench.day --minutes $(or $(MINUTES),120)

bench: setup ## beside real Docker Swarm, in alternating pairs; results kept in bench/results/
	@$(BIN)/python -m bench.run

bench-networks: setup ## all figures of networks with their limits; results kept in bench/results/
	@$(BIN)/python -m bench.networks

bench-builds: setup ## pulls, builds and starts of images with their limits; results kept in bench/results/
	@$(BIN)/python -m bench.builds

bench-around: setup ## logs, execs, health checks, secrets, docker compose, with their limits; results kept in bench/results/
	@$(BIN)/python -m bench.around

bench-page: setup ## write docs/guide/performance.md, and the figures of other pages, from the newest results
	@$(BIN)/python -m bench.page

bare: setup-run ## both commands of the README in a bare machine (SUITE=trixie, noble, resolute); log kept in bench/results/
	@mkdir -p bench/results
	@setup/bare.sh $(SUITE) $(call kept,bare-$(SUITE))

# Every instruction is translated there, so a test may take ten times as long.
emulated: setup-run ## the unit tests on a bare arm64 machine, emulated by qemu (SUITE=trixie); log kept in bench/results/
	@mkdir -p bench/results
	@ARCH=arm64 setup/bare.sh $(SUITE) "apt-get -q update && apt-get -q -y install --no-install-recommends python3-venv nftables iproute2 procps runc conmon tini busybox-static" \
	    "setup/python.sh python3 /root/skep/.venv dev" \
	    ".venv/bin/python -m pytest tests/unit -q -m 'not slow' --timeout 600 -n $(shell nproc) --dist loadfile" \
	    $(call kept,emulated-arm64-$(SUITE))

package: setup-run ## a wheel and a Debian package in dist/ (VERSION=, else the tag's)
	@setup/package.sh dist $(VERSION)

release: setup ## what a release has, in dist/release-VERSION/: packages, tarball, apt repository, site; signed by KEY= of gpg
	@KEY='$(KEY)' setup/release.sh $(or $(VERSION),$(error name the version: make release VERSION=0.1.0))

bare-package: setup ## the Debian package on bare machines with systemd (SUITE=trixie, noble); log kept in bench/results/
	@mkdir -p bench/results
	@$(PYTEST) -s tests/integration/test_packages.py -k $(SUITE) $(call kept,package-$(SUITE))

bare-release: setup ## a release (VERSION=) installed on a bare machine without Python (SUITE=trixie); log kept in bench/results/
	@mkdir -p bench/results
	@setup/bare-release.sh dist/release-$(or $(VERSION),$(error name the version: make bare-release VERSION=0.1.0)) $(SUITE) \
	    $(call kept,release-$(SUITE))

virtual: setup-run ## limits, isolation, NFS and cgroup v2 alone, in a virtual machine (SUITE=trixie); log kept in bench/results/
	@mkdir -p bench/results
	@setup/virtual.sh $(SUITE) "$(if $(SKEP_TEST_RUNTIME),SKEP_TEST_RUNTIME=$(SKEP_TEST_RUNTIME) )$(BIN)/pytest -v --timeout 900 $(VIRTUAL_TESTS)" \
	    $(call kept,virtual-$(SUITE))

bare-cluster: setup ## a newcomer's course with a release (VERSION=) on three bare machines (SUITE=trixie, noble); log kept in bench/results/
	@mkdir -p bench/results
	@setup/course.sh bare $(SUITE) dist/release-$(or $(VERSION),$(error name the version: make bare-cluster VERSION=0.1.0)) \
	    $(call kept,bare-cluster-$(SUITE))

virtual-cluster: setup ## a release (VERSION=) on three virtual machines that are cut off and rebooted (SUITE=trixie), an hour; log kept in bench/results/
	@mkdir -p bench/results
	@setup/course.sh virtual $(SUITE) dist/release-$(or $(VERSION),$(error name the version: make virtual-cluster VERSION=0.1.0)) \
	    $(call kept,virtual-cluster-$(SUITE))

site: setup ## the documents as a site, in build/site/ (VERSION=, if it is the site of a release)
	@NO_MKDOCS_2_WARNING=1 SKEP_RELEASE=$(VERSION) SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) $(BIN)/python -m mkdocs build && echo "build/site/index.html"

reference: setup ## write the pages of docs/reference/ that follow from the code, and the man page
	@$(BIN)/python -m docs.reference.generate

lock: setup ## renew the lock files from pyproject.toml
	@setup/lock.sh

# lmrun: `make help` lists the targets.

TARGET  := x86_64-unknown-linux-gnu
RELEASE := target/$(TARGET)/release
BINARY  := $(RELEASE)/lmrun
PREFIX  ?= /usr/local
BENCH   ?=
CONFORMANCE ?=
ENGINES ?=
FAULTS  ?=
WORKLOADS ?=
# Seconds for each of what is fuzzed.
FUZZ    ?= 60
TOOLS   := runtime-tests/tools.sh
# What installing takes, for whom it takes that.
SUDO    := $(if $(filter 0,$(shell id -u)),,sudo)
# rustup's default place, for a shell that has not read its profile again.
export PATH := $(HOME)/.cargo/bin:$(PATH)
# The validation suite in short.
SUITE   := create default hostname kill killsig linux_devices linux_masked_paths linux_ns_path linux_readonly_paths linux_seccomp \
	linux_sysctl linux_uid_mappings mounts process process_oom_score_adj process_user root_readonly_true state
# What Debian 12 does not have: scenarios print that they are skipped.
EXPECTED ?= no CRIU 4.x
# Scenarios that run at a time: each may keep two processors busy.
JOBS    ?= 2

.DEFAULT_GOAL := all
.PHONY: all help fuzz manual deb test-deb install-docker demo demo-docker bench-migrate bench-engine bench-disk bench-lifecycle test test-conformance test-engines test-faults test-there-and-back test-workloads unit scenarios lint soak install clean tools-build tools-test

all: tools-build ## Build the one static binary
	cargo build --release --locked
	@echo built $(BINARY)

help: ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

demo: all tools-test ## Move a Redis under load between two hosts (network namespaces of this machine)
	cargo build --release --locked -p runtime-tests --bin demo
	LMRUN=$(CURDIR)/$(BINARY) $(RELEASE)/demo

demo-docker: all ## The same between two Docker hosts
	@$(TOOLS) build test engines
	cargo build --release --locked -p runtime-tests --bin demo_docker
	LMRUN=$(CURDIR)/$(BINARY) $(RELEASE)/demo_docker

bench-migrate: all tools-test ## lmrun migrate against its bars, and runc + CRIU where they are on the PATH, as a table (BENCH: flags)
	cargo build --release --locked -p runtime-tests --bin bench_migrate --bin bench_guest --bin ssh_stand_in
	LMRUN=$(CURDIR)/$(BINARY) $(RELEASE)/bench_migrate $(BENCH)

bench-lifecycle: all tools-test ## A container's life, exec, state, peak memory, beside runc and crun where installed, as a table (BENCH: flags)
	cargo build --release --locked -p runtime-tests --bin bench_lifecycle
	if [ -e /sys/fs/cgroup/cgroup.controllers ]; then views=host; else views='v1 v2'; fi; \
	for view in $$views; do LMRUN=$(CURDIR)/$(BINARY) $(RELEASE)/bench_lifecycle --cgroups $$view $(BENCH) || exit 1; done

bench-engine: all ## Dump, restore, freeze, remote calls, beside memcpy, as a table (BENCH: flags)
	cargo build --release --locked -p runtime-tests --bin bench_engine --bin workload
	LMRUN=$(CURDIR)/$(BINARY) $(RELEASE)/bench_engine $(BENCH)

bench-disk: ## What a container's files add to the freeze, as a table (BENCH: flags)
	cargo build --release --locked -p runtime-tests --bin bench_disk
	$(RELEASE)/bench_disk $(BENCH)

test: lint unit scenarios ## Lint, unit tests, and every scenario (needs root)

unit: tools-build ## Unit tests alone
	cargo test --locked --workspace --lib --bins

scenarios: all tools-test ## Scenarios alone: containers that check themselves around a checkpoint
	@$(TOOLS) conformance
	runtime-tests/conformance/build.sh target/conformance-short $(SUITE)
	LMRUN=$(CURDIR)/$(BINARY) LMRUN_SUITE=$(CURDIR)/target/conformance-short/suite LMRUN_EXPECT_SKIP='$(EXPECTED)' cargo test --locked -p runtime-tests --no-fail-fast --tests -- --test-threads=$(JOBS)

lint: tools-build ## Formatting and clippy, where this toolchain has them
	if cargo fmt --version >/dev/null 2>&1; then cargo fmt --all --check; else echo "SKIP fmt: no rustfmt"; fi
	if cargo clippy --version >/dev/null 2>&1; then cargo clippy --locked --workspace --all-targets -- -D warnings; else echo "SKIP clippy: no clippy"; fi

test-conformance: all ## The OCI validation suite, from Debian's source package, against lmrun and runc (CONFORMANCE: flags)
	@$(TOOLS) conformance
	runtime-tests/conformance/build.sh target/conformance
	cargo build --release --locked -p runtime-tests --bin conformance
	LMRUN=$(CURDIR)/$(BINARY) $(RELEASE)/conformance --suite target/conformance/suite $(CONFORMANCE)

test-engines: all ## Docker, containerd and Podman, old and new, drive lmrun with real workloads: a table (installs them; ENGINES: flags)
	@$(TOOLS) build test engines newer-engines
	LMRUN=$(CURDIR)/$(BINARY) cargo test --locked -p runtime-tests --test engines -- --test-threads=1
	cargo build --release --locked -p runtime-tests --bin engines
	LMRUN=$(CURDIR)/$(BINARY) $(RELEASE)/engines $(ENGINES)

test-faults: all tools-test ## kill -9, cut links, full disks and others at 200 random moments of a move (FAULTS: flags)
	cargo build --release --locked -p runtime-tests --bin faults --bin ssh_stand_in
	LMRUN=$(CURDIR)/$(BINARY) $(RELEASE)/faults $(FAULTS)

test-there-and-back: all tools-test ## A Redis with a client moves back and forth 100 times: nothing grows
	cargo build --release --locked -p runtime-tests --bin there_and_back --bin ssh_stand_in
	LMRUN=$(CURDIR)/$(BINARY) $(RELEASE)/there_and_back

test-workloads: all tools-test ## Redis, nginx, PostgreSQL, a JVM move 10 times each under their clients, as a table (WORKLOADS: flags)
	@$(TOOLS) workloads
	cargo build --release --locked -p runtime-tests --bin workloads --bin ssh_stand_in
	LMRUN=$(CURDIR)/$(BINARY) $(RELEASE)/workloads $(WORKLOADS)

fuzz: all tools-test ## Hostile input for FUZZ (60) seconds each: config.json, seccomp profiles, images, the page server
	cargo build --locked -p runtime-tests --bin fuzz --bin workload
	LMRUN=$(CURDIR)/$(BINARY) target/$(TARGET)/debug/fuzz $(FUZZ)

soak: all tools-test ## kill -9 at 50 random moments of everything, then 20 demos
	LMRUN=$(CURDIR)/$(BINARY) LMRUN_CRASHES=50 cargo test --locked -p runtime-tests --test crash -- --test-threads=1 --nocapture
	cargo build --release --locked -p runtime-tests --bin demo
	for n in $$(seq 20); do LMRUN=$(CURDIR)/$(BINARY) $(RELEASE)/demo || exit 1; done

manual: all ## Man pages and shell completions, from the definition of the command line: target/manual
	cargo run --release --locked -q --example manual target/manual

install: all manual ## Install to PREFIX (/usr/local); CRIU=1: answer by the name criu, too, for Podman and CRI-O
	$(SUDO) install -D -m 755 $(BINARY) $(DESTDIR)$(PREFIX)/bin/lmrun
	$(SUDO) install -D -m 644 -t $(DESTDIR)$(PREFIX)/share/man/man8 target/manual/man8/*.8
	$(SUDO) install -D -m 644 target/manual/completions/lmrun.bash $(DESTDIR)$(PREFIX)/share/bash-completion/completions/lmrun
	$(SUDO) install -D -m 644 target/manual/completions/_lmrun $(DESTDIR)$(PREFIX)/share/zsh/site-functions/_lmrun
	$(SUDO) install -D -m 644 target/manual/completions/lmrun.fish $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/lmrun.fish
	if [ -n "$(CRIU)" ]; then [ -e $(DESTDIR)$(PREFIX)/bin/criu ] || $(SUDO) ln -s lmrun $(DESTDIR)$(PREFIX)/bin/criu; fi

install-docker: install ## The same, and make lmrun a runtime of this machine's Docker
	$(SUDO) contrib/docker/enable.sh $(PREFIX)/bin/lmrun

deb: all manual ## A Debian package: target/lmrun_VERSION_amd64.deb
	contrib/debian/build.sh $(BINARY) target/manual target

test-deb: deb ## Install it in a clean Debian 12 and 13 (debootstrap), and run a container there
	@$(TOOLS) deb
	runtime-tests/deb.sh target/lmrun_*_amd64.deb

clean: ## Remove what was built
	cargo clean

tools-build:
	@$(TOOLS) build

tools-test:
	@$(TOOLS) build test

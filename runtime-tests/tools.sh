#!/bin/sh
# tools.sh GROUP...: installs what a group of make targets needs and this machine lacks.
# For Debian and its kin; elsewhere it says what is missing.
#   build   a Rust toolchain, a linker, the C library to link statically
#   deb     debootstrap, to make clean trees with, lintian, and busybox for a container in them
#   engines Docker, containerd, Podman, and nginx, PostgreSQL, a JVM and Python to run in them
#   workloads  nginx, wrk, PostgreSQL, a JVM
#   newer-engines  Docker, containerd and Podman of a newer Debian, in a tree of their own
#   test    Redis, busybox, systemd, runc to compare with, iproute2, nftables, ssh, and crit and checkpointctl to read images with
#   conformance   Go and the libraries that the OCI validation suite is built with, runc to compare with
set -eu
cache=${XDG_CACHE_HOME:-$HOME/.cache}/lmrun-tools
packages=

# need COMMAND PACKAGE
need() {
    command -v "$1" >/dev/null 2>&1 || [ -x "/usr/sbin/$1" ] || packages="$packages $2"
}

# need_package PACKAGE: one that brings no command
need_package() {
    dpkg -s "$1" >/dev/null 2>&1 || packages="$packages $1"
}

install_packages() {
    [ -n "$packages" ] || return 0
    echo "installing:$packages"
    if ! command -v apt-get >/dev/null; then
        echo "please install:$packages" >&2
        exit 1
    fi
    # A daemon that comes with a package is not to be started.
    policy=/usr/sbin/policy-rc.d
    [ -e $policy ] && policy= || { printf '#!/bin/sh\nexit 101\n' >$policy; chmod +x $policy; }
    status=0
    # shellcheck disable=SC2086
    { apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends $packages; } >"${TMPDIR:-/tmp}/lmrun-apt.log" 2>&1 || status=$?
    [ -z "$policy" ] || rm -f $policy
    [ $status = 0 ] || { cat "${TMPDIR:-/tmp}/lmrun-apt.log" >&2; exit $status; }
    packages=
}

# The toolchain that Cargo.toml asks for, or a newer one.
toolchain() {
    wanted=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml | head -1)
    have=$(cargo --version 2>/dev/null | cut -d' ' -f2 || true)
    if [ -n "$have" ] && [ "$(printf '%s\n' "$wanted" "$have" | sort -V | head -1)" = "$wanted" ]; then
        return 0
    fi
    echo "please install Rust $wanted or newer (found ${have:-none})" >&2
    exit 1
}

# crit and checkpointctl: where this distribution lacks them, from a small tree of a newer Debian. They run with the
# tree's own loader and libraries, as $cache/bin/crit and $cache/bin/checkpointctl.
decoders() {
    [ -z "${LMRUN_NO_DECODERS:-}" ] || return 0
    command -v crit >/dev/null 2>&1 && command -v checkpointctl >/dev/null 2>&1 && return 0
    [ -x "$cache/bin/crit" ] && [ -x "$cache/bin/checkpointctl" ] && return 0
    need debootstrap debootstrap
    install_packages
    echo "making a tree with crit and checkpointctl in $cache"
    rm -rf "$cache"
    mkdir -p "$cache/bin"
    tree=$cache/tree
    if ! debootstrap --variant=minbase --include=python3-pycriu,checkpointctl trixie "$tree" >"$cache/debootstrap.log" 2>&1; then
        rm -rf "$tree"
        echo "no crit and checkpointctl: see $cache/debootstrap.log" >&2
        return 0
    fi
    loader="$tree/lib64/ld-linux-x86-64.so.2 --library-path $tree/usr/lib/x86_64-linux-gnu"
    printf '#!/bin/sh\nPYTHONHOME=%s/usr PYTHONDONTWRITEBYTECODE=1 exec %s %s %s/usr/bin/crit "$@"\n' \
        "$tree" "$loader" "$(readlink -f "$tree/usr/bin/python3")" "$tree" >"$cache/bin/crit"
    printf '#!/bin/sh\nexec %s %s/usr/bin/checkpointctl "$@"\n' "$loader" "$tree" >"$cache/bin/checkpointctl"
    chmod +x "$cache/bin/crit" "$cache/bin/checkpointctl"
}

# Docker, containerd and Podman of a newer Debian, to be run with that tree as their root. Debian 12's debootstrap does
# not know the name of the suite, but how to make it.
newer_engines() {
    trees=${XDG_CACHE_HOME:-$HOME/.cache}/lmrun-engines
    [ ! -d "$trees/tree" ] || return 0
    need debootstrap debootstrap
    install_packages
    echo "making a tree with newer engines in $trees"
    rm -rf "$trees"
    mkdir -p "$trees"
    programs=docker.io,docker-cli,containerd,runc,crun,podman,conmon,netavark,aardvark-dns,catatonit,tini
    programs=$programs,iptables,nftables,iproute2,procps
    if ! debootstrap --variant=minbase --include=$programs forky "$trees/unfinished" http://deb.debian.org/debian sid \
        >"$trees/debootstrap.log" 2>&1; then
        rm -rf "$trees/unfinished"
        echo "no newer engines: see $trees/debootstrap.log" >&2
        return 0
    fi
    rm -rf "$trees"/unfinished/var/cache/apt/archives/*.deb "$trees"/unfinished/var/lib/apt/lists/*
    mv "$trees/unfinished" "$trees/tree"
}

for group in "$@"; do
    case $group in
    build)
        need cc gcc
        [ -e /usr/lib/x86_64-linux-gnu/libc.a ] || need libc.a libc6-dev
        install_packages
        toolchain
        ;;
    conformance)
        need go golang-go
        need runc runc
        need xz xz-utils
        for library in blang-semver google-uuid hashicorp-go-multierror mrunalp-fileutils opencontainers-selinux \
            opencontainers-specs sirupsen-logrus stretchr-testify urfave-cli xeipuuv-gojsonschema; do
            need_package "golang-github-$library-dev"
        done
        need_package golang-gocapability-dev
        need_package golang-golang-x-sys-dev
        install_packages
        ;;
    deb)
        need debootstrap debootstrap
        need lintian lintian
        need busybox busybox-static
        need unshare util-linux
        install_packages
        ;;
    engines)
        need dockerd docker.io
        need containerd containerd
        need podman podman
        need conmon conmon
        need catatonit catatonit
        need nginx nginx-light
        [ -n "$(ls -d /usr/lib/postgresql/*/bin/postgres 2>/dev/null)" ] || need postgres postgresql
        need java openjdk-17-jdk-headless
        need python3 python3
        need script bsdutils
        install_packages
        ;;
    workloads)
        need nginx nginx-light
        need wrk wrk
        [ -n "$(ls -d /usr/lib/postgresql/*/bin/postgres 2>/dev/null)" ] || need postgres postgresql
        need java openjdk-17-jdk-headless
        install_packages
        ;;
    newer-engines)
        newer_engines
        ;;
    test)
        need redis-server redis-server
        need busybox busybox-static
        need ip iproute2
        need nft nftables
        need nsenter util-linux
        need ssh openssh-client
        need sshd openssh-server
        need newuidmap uidmap
        [ -x /lib/systemd/systemd ] || need systemd systemd
        need dbus-daemon dbus-daemon
        need runc runc
        install_packages
        decoders
        ;;
    *)
        echo "unknown group $group" >&2
        exit 2
        ;;
    esac
done

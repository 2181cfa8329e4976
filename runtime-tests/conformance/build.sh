#!/bin/sh
# build.sh DIR [TEST...]: builds the OCI validation suite (opencontainers/runtime-tools), or these tests of it, in DIR, from
# Debian's source package.
# DIR/suite then has validation/*/*.t and what they expect beside them: runtimetest and the root file system.
# What it needs: tools.sh conformance.
set -eu
here=$(dirname "$(readlink -f "$0")")
mkdir -p "$1"
dir=$(readlink -f "$1")
shift
suite=$dir/suite
[ ! -e "$suite/complete" ] || exit 0
log=$dir/build.log
fail() {
    cat "$log" >&2
    echo "build.sh: $1" >&2
    exit 1
}

# A package list of its own: the host's is left alone.
apt=$dir/apt
mkdir -p "$apt/lists/partial" "$apt/archives/partial"
echo "deb-src [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian trixie main" >"$apt/sources.list"
cat >"$apt/apt.conf" <<EOF
Dir::Etc::sourcelist "$apt/sources.list";
Dir::Etc::sourceparts "-";
Dir::State::lists "$apt/lists";
Dir::Cache "$apt";
APT::Sandbox::User "root";
EOF
export APT_CONFIG="$apt/apt.conf"
apt-get update -q >"$log" 2>&1 || fail "no package list"
# The description of the package may be gone from the mirror while the sources are there.
(cd "$apt" && apt-get source -q --download-only golang-github-opencontainers-runtime-tools) >>"$log" 2>&1 || true
tarball=$(ls "$apt"/golang-github-opencontainers-runtime-tools_*.orig.tar.* 2>/dev/null | head -1)
[ -n "$tarball" ] || fail "no source package"

rm -rf "$suite" "$dir/gopath"
mkdir -p "$suite" "$dir/gopath/src/github.com/opencontainers" "$dir/gopath/src/github.com/mndrix"
tar -xf "$tarball" -C "$suite" --strip-components=1
ln -s "$suite" "$dir/gopath/src/github.com/opencontainers/runtime-tools"
# The one library that Debian does not have.
cp -r "$here/tap-go" "$dir/gopath/src/github.com/mndrix/tap-go"
export GO111MODULE=off GOFLAGS= CGO_ENABLED=0 GOPATH="$dir/gopath:/usr/share/gocode" GOCACHE="$dir/gocache"
cd "$dir/gopath/src/github.com/opencontainers/runtime-tools"
go build -o runtimetest ./cmd/runtimetest >>"$log" 2>&1 || fail "runtimetest does not build"
for source in validation/*/*.go; do
    name=$(basename "$(dirname "$source")")
    [ "$name" != util ] || continue
    case " $* " in *" $name "* | "  ") ;; *) continue ;; esac
    go build -o "${source%.go}.t" "./$source" >>"$log" 2>&1 || fail "$source does not build"
done
touch complete

#!/bin/sh
# build.sh BINARY MANUAL OUT: a Debian package of lmrun in directory OUT, with dpkg-deb alone.
#   MANUAL  what `make manual` writes
set -eu
umask 022
binary=$1 manual=$2 out=$3
version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -1)
description=$(sed -n 's/^description = "\(.*\)"/\1/p' Cargo.toml | head -1)
[ -n "${SOURCE_DATE_EPOCH:-}" ] || SOURCE_DATE_EPOCH=$(git log -1 --format=%ct 2>/dev/null || date +%s)
export SOURCE_DATE_EPOCH
tree=$(mktemp -d)
trap 'rm -rf "$tree"' EXIT
doc=$tree/usr/share/doc/lmrun
examples=$doc/examples

install -D -m 755 "$binary" "$tree/usr/bin/lmrun"
install -D -m 644 contrib/lmrun.conf "$tree/etc/lmrun/lmrun.conf"
mkdir -p "$tree/usr/share/man/man8"
for page in "$manual"/man8/*.8; do
    gzip -9n <"$page" >"$tree/usr/share/man/man8/$(basename "$page").gz"
done
install -D -m 644 "$manual/completions/lmrun.bash" "$tree/usr/share/bash-completion/completions/lmrun"
install -D -m 644 "$manual/completions/_lmrun" "$tree/usr/share/zsh/vendor-completions/_lmrun"
install -D -m 644 "$manual/completions/lmrun.fish" "$tree/usr/share/fish/vendor_completions.d/lmrun.fish"

# Configuration for engines is theirs to take: it lies ready.
mkdir -p "$examples"
cp README.md docs/*.md "$doc"
for engine in containerd crio docker kubernetes podman; do
    cp -r "contrib/$engine" "$examples"
done
cp contrib/README.md "$examples"
grep -rl /usr/local/bin/lmrun "$examples" | xargs sed -i 's,/usr/local/bin/lmrun,/usr/bin/lmrun,g'
sed -i 's,make install CRIU=1,ln -s lmrun /usr/bin/criu,g' "$examples/README.md" "$examples"/*/*
sed -i 's,(lmrun.conf),(/etc/lmrun/lmrun.conf),g' "$examples/README.md"
cp contrib/debian/copyright "$doc"
printf 'lmrun (%s) unstable; urgency=medium\n\n  * As of this date.\n\n -- %s  %s\n' "$version" \
    "$(sed -n 's/^Maintainer: //p' contrib/debian/control)" "$(LC_ALL=C date -Ru -d "@$SOURCE_DATE_EPOCH")" |
    gzip -9n >"$doc/changelog.gz"
install -D -m 644 contrib/debian/lintian-overrides "$tree/usr/share/lintian/overrides/lmrun"

mkdir -p "$tree/DEBIAN"
echo /etc/lmrun/lmrun.conf >"$tree/DEBIAN/conffiles"
(cd "$tree" && find usr etc -type f -print0 | sort -z | xargs -0 md5sum) >"$tree/DEBIAN/md5sums"
sed -e "s/@VERSION@/$version/; s/@DESCRIPTION@/$description/" -e "s/@SIZE@/$(du -sk --exclude=DEBIAN "$tree" | cut -f1)/" \
    contrib/debian/control >"$tree/DEBIAN/control"
find "$tree" -type d -exec chmod 755 {} +
find "$tree" -type f ! -name lmrun ! -name '*.sh' -exec chmod 644 {} +
mkdir -p "$out"
dpkg-deb --root-owner-group -Zxz --build "$tree" "$out/lmrun_${version}_amd64.deb"

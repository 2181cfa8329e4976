#!/bin/sh
# deb.sh DEB: installs the package in a clean Debian 12 and a clean Debian 13, runs a container with it in each, and removes it.
# The trees are made by debootstrap, once, and kept in the cache; what happens to them here is gone afterwards.
set -eu
deb=$(realpath "$1")
cache=${XDG_CACHE_HOME:-$HOME/.cache}/lmrun-tools
busybox=$(command -v busybox)

if command -v lintian >/dev/null; then
    lintian --fail-on error --tag-display-limit 0 "$deb"
else
    echo "SKIP lintian: not installed"
fi
for suite in bookworm trixie; do
    tree=$cache/debian-$suite
    if [ ! -e "$tree.complete" ]; then
        echo "making a tree of Debian $suite in $tree"
        rm -rf "$tree"
        mkdir -p "$cache"
        debootstrap --variant=minbase "$suite" "$tree" >"$cache/debian-$suite.log" 2>&1 ||
            { tail "$cache/debian-$suite.log" >&2; exit 1; }
        touch "$tree.complete"
    fi
    unshare --mount --pid --fork --propagation private sh -eu -s "$tree" "$deb" "$busybox" <<'INSIDE'
tree=$1 deb=$2 busybox=$3
over=$(mktemp -d)
mount -t tmpfs tmpfs "$over"
mkdir "$over/upper" "$over/work" "$over/root"
mount -t overlay -o "lowerdir=$tree,upperdir=$over/upper,workdir=$over/work" overlay "$over/root"
cd "$over/root"
mount -t proc proc proc
mount -t sysfs sysfs sys
mount --rbind /sys/fs/cgroup sys/fs/cgroup
mount --rbind /dev dev
mkdir -p run bundle/rootfs/bin
mount -t tmpfs tmpfs run
cp "$deb" package.deb
cp "$busybox" bundle/rootfs/bin/busybox
ln -s busybox bundle/rootfs/bin/sh
# The namespace's own root, as on a machine.
mkdir old
pivot_root . old
exec sh -eux <<'TREE'
umount -l /old
rmdir /old
dpkg -i /package.deb
lmrun --version
cd /bundle
lmrun spec
sed -i 's/"terminal": true/"terminal": false/; s/"sh"$/"sh", "-c", "echo a container of $(cat \/proc\/1\/comm) runs; exit 7"/' config.json
code=0
lmrun run web1 >/tmp/out || code=$?
cat /tmp/out
[ $code = 7 ]
grep -q 'a container of sh runs' /tmp/out
[ -z "$(lmrun list -q)" ]
# What comes with it.
for page in lmrun lmrun-run lmrun-checkpoint; do gzip -dc /usr/share/man/man8/$page.8.gz | grep -q EXAMPLES; done
bash -c '. /usr/share/bash-completion/completions/lmrun; complete -p lmrun'
dpkg-query -W -f '${Conffiles}' lmrun | grep -q ' /etc/lmrun/lmrun.conf '
[ -x /usr/share/doc/lmrun/examples/docker/enable.sh ] || [ -n "$(find /etc/dpkg/dpkg.cfg.d -type f)" ]
dpkg --purge lmrun
[ ! -e /usr/bin/lmrun ] && [ ! -e /etc/lmrun ]
TREE
INSIDE
    echo "ok: Debian $suite"
done

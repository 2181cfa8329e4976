#!/bin/sh
# enable.sh [LMRUN]: makes lmrun a runtime of this machine's Docker: docker run --runtime=lmrun ...
# Adds to /etc/docker/daemon.json (what is in it stays; the old file is kept beside it) and has dockerd read it.
# Checkpoints (docker checkpoint create) need dockerd to be experimental; that takes effect when it is started next.
set -eu
lmrun=$(command -v "${1:-lmrun}") || { echo "${1:-lmrun} is not there; make install" >&2; exit 1; }
file=${DOCKER_CONFIG_FILE:-/etc/docker/daemon.json}
mkdir -p "$(dirname "$file")"
if [ -s "$file" ]; then
    command -v python3 >/dev/null || { echo "$file is there: add what is in $(dirname "$0")/daemon.json by hand, or install python3" >&2; exit 1; }
    cp "$file" "$file.before-lmrun"
    python3 - "$file" "$lmrun" <<'P'
import json, sys
path, lmrun = sys.argv[1:]
with open(path) as file:
    config = json.load(file)
config.setdefault("runtimes", {})["lmrun"] = {"path": lmrun}
config.setdefault("experimental", True)
with open(path, "w") as file:
    json.dump(config, file, indent=2)
    file.write("\n")
P
else
    printf '{\n  "runtimes": { "lmrun": { "path": "%s" } },\n  "experimental": true\n}\n' "$lmrun" >"$file"
fi
# dockerd takes runtimes over when it is told to read its configuration again.
pid=${DOCKER_PID_FILE:-/var/run/docker.pid}
if command -v systemctl >/dev/null && systemctl is-active --quiet docker 2>/dev/null; then
    systemctl reload docker
elif [ -s "$pid" ] && kill -HUP "$(cat "$pid")"; then
    :
else
    echo "dockerd does not run; it knows lmrun when it is started next"
fi

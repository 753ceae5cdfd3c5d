#!/bin/sh
# Goal: the compose fleet of deploy/compose.yaml works as it stands: a coordinator and three nodes,
# one of them limited to 256 MB and half a core, finish three rounds, and the held-out loss falls on
# every node and in every round. The small node is stopped and started again on the way.
# Method: build the images, start the fleet with a text of its own for each node, wait until all
# have scored the last round's layers, then read what the coordinator was told and what the engine
# knows of the containers. Everything that was started is ended; the images stay, as a cache.
#
# Exit 77 (skipped) without root or without a Docker engine.
#   FLEETUNE_MODEL, FLEETUNE_CACHE   see deploy/model.sh
#   FLEETUNE_DATA                    folder with fleet/*.txt (default ../shared/data)
set -eu
cd "$(dirname "$0")/../.."
base=debian:bookworm-slim
tag=e2e
fleet_s=1200 # for everything after the images are there; a busy machine needs minutes
project="fleetune-e2e-$$"
state=/var/lib/fleetune/run
work=
up=

say() { echo "docker: $*"; }
skip() {
    say "skipped: $*"
    exit 77
}
fail() {
    say "FAILED: $*" >&2
    exit 1
}

[ "$(id -u)" -eq 0 ] || skip "this user is not root"
command -v docker >/dev/null || skip "there is no docker program"
timeout 20 docker info >/dev/null 2>&1 || skip "no Docker engine answers"
command -v python3 >/dev/null || skip "there is no python3"
if docker compose version >/dev/null 2>&1; then
    compose="docker compose"
elif command -v docker-compose >/dev/null; then
    compose="docker-compose"
else
    skip "neither docker compose nor docker-compose is there"
fi

# shellcheck source=deploy/model.sh
. deploy/model.sh

# in_fleet SECONDS COMMAND...: of compose, on this test's own project
in_fleet() {
    seconds="$1"
    shift
    # shellcheck disable=SC2086
    timeout "$seconds" $compose -p "$project" -f deploy/compose.yaml "$@" </dev/null
}

clean() {
    status=$?
    trap - EXIT INT TERM
    if [ -n "$up" ]; then
        if [ "$status" -ne 0 ]; then
            say "what the containers said last:"
            in_fleet 30 logs --tail 15 2>&1 || true
        fi
        in_fleet 120 down -v --remove-orphans --timeout 10 >"$work/down" 2>&1 || cat "$work/down"
    fi
    [ -z "$work" ] || rm -rf "$work"
    exit "$status"
}
trap clean EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
work="$(mktemp -d)"
chmod 755 "$work"

# ---- images

# Without a registry: the base, made of Debian's packages. It gets this machine's apt settings, so
# that a build finds the same mirror as we do.
make_base() {
    command -v debootstrap >/dev/null || {
        apt-get update -qq && apt-get install -y -qq --no-install-recommends debootstrap >/dev/null
    } || skip "no registry gives $base, and debootstrap cannot be installed"
    # shellcheck disable=SC2016
    mirror="$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' \
        'Codename: bookworm' 'Component: main' 2>/dev/null | head -n 1)"
    say "making $base of packages, once"
    # shellcheck disable=SC2086
    timeout 900 debootstrap --variant=minbase bookworm "$work/base" $mirror >"$work/log" 2>&1 || {
        tail -n 5 "$work/log"
        skip "no registry gives $base, and debootstrap failed"
    }
    rm -f "$work/base/etc/apt/sources.list" "$work"/base/var/cache/apt/archives/*.deb
    for part in sources.list sources.list.d apt.conf apt.conf.d trusted.gpg trusted.gpg.d keyrings; do
        [ ! -e "/etc/apt/$part" ] || cp -a "/etc/apt/$part" "$work/base/etc/apt/"
    done
    cp -a /usr/share/keyrings/. "$work/base/usr/share/keyrings/"
    tar -C "$work/base" -c . | docker import --change 'CMD ["bash"]' \
        --change 'LABEL made-by=fleetune-tests' - "$base" >/dev/null
    rm -rf "$work/base"
}

build_image() { # TARGET
    proxies=
    for name in http_proxy https_proxy no_proxy; do
        eval "value=\${$name:-}"
        [ -z "$value" ] || proxies="$proxies --build-arg $name"
    done
    # shellcheck disable=SC2086
    timeout 1500 docker build --force-rm --network host $proxies -f deploy/Dockerfile --target "$1" \
        -t "fleetune-$1:$tag" . >"$work/log" 2>&1 || {
        tail -n 30 "$work/log"
        fail "the image of the $1 does not build"
    }
}

start="$(date +%s)"
model="$(fetch_model)" || skip "there is no model"
if ! docker image inspect "$base" >/dev/null 2>&1; then
    timeout 120 docker pull -q "$base" >/dev/null 2>&1 || make_base
fi
docker buildx version >/dev/null 2>&1 || export DOCKER_BUILDKIT=0
build_image node
build_image coordinator
say "images ready after $(($(date +%s) - start)) s"

# ---- the fleet: three domains that differ, or what every Debian machine has

texts="$work/texts"
mkdir -m 755 "$texts"
data="${FLEETUNE_DATA:-../shared/data}/fleet"
if [ -f "$data/legal.txt" ] && [ -f "$data/shakespeare.txt" ] && [ -f "$data/recipes.txt" ]; then
    cp "$data/legal.txt" "$data/shakespeare.txt" "$data/recipes.txt" "$texts/"
else
    say "no corpora at $data: licences, package descriptions and copyright notes instead"
    python3 -B tests/e2e/docker_texts.py "$texts"
fi
chmod 644 "$texts"/*.txt

export FLEETUNE_TAG="$tag" FLEETUNE_TEXTS="$texts" FLEETUNE_MODEL="$model"
export FLEETUNE_COMPRESS="--bits 4 --policy uniform --calibration-tokens 256"
export FLEETUNE_INIT="--rounds 3 --updates-per-round 3 --min-updates 3 --steps 16 --sequence 128 \
--eval-tokens 512 --window 4 --retry 500"

start="$(date +%s)"
in_time() { [ $(($(date +%s) - start)) -lt "$fleet_s" ] || fail "$1 within $fleet_s s"; }
coordinator() { in_fleet 30 exec -T coordinator fleetune-coordinator "$@" --json 2>/dev/null; }

up=1
in_fleet "$fleet_s" up -d --no-build --scale node=2 >"$work/log" 2>&1 || {
    cat "$work/log"
    fail "the fleet does not start"
}
small="$(in_fleet 30 ps -q small)"
say "fleet up, model compressed, after $(($(date +%s) - start)) s"

# The most that the small node's cgroup has held; a container that is started again has a new one.
peak=0
sample_peak() {
    now="$(timeout 20 docker exec "$small" sh -c \
        'cd /sys/fs/cgroup && cat memory.peak 2>/dev/null || cat memory/memory.max_usage_in_bytes' \
        2>/dev/null || echo 0)"
    [ "${now:-0}" -le "$peak" ] || peak="$now"
}

# A node that is stopped while it trains ends at once and well, and goes on when it is started.
until docker logs "$small" 2>&1 | grep -q 'task.started'; do
    in_time "the small node got no task"
    sleep 1
done
sample_peak
before="$(date +%s)"
timeout 200 docker stop -t 120 "$small" >/dev/null
code="$(docker inspect -f '{{.State.ExitCode}}' "$small")"
[ "$code" -eq 0 ] || fail "the small node ended with $code when asked to stop"
say "the small node stopped in $(($(date +%s) - before)) s"
timeout 60 docker start "$small" >/dev/null

until coordinator nodes "$state" | python3 -B tests/e2e/docker_check.py finished; do
    in_time "three rounds were not done"
    sample_peak
    sleep 2
done
say "three rounds after $(($(date +%s) - start)) s"
coordinator nodes "$state" >"$work/nodes.json"
coordinator rounds "$state" >"$work/rounds.json"
coordinator verify "$state" >/dev/null || fail "the coordinator's state is not whole"

# The run is over: nodes end by themselves, the coordinator when it is asked.
for service in node small; do
    for id in $(in_fleet 30 ps -aq "$service"); do
        timeout 30 docker wait "$id" >/dev/null || fail "a node did not end with the run"
    done
done
in_fleet 60 stop >/dev/null 2>&1 || fail "the fleet does not stop"
all="$(in_fleet 30 ps -aq)"
for id in $all; do
    code="$(docker inspect -f '{{.State.ExitCode}}' "$id")"
    [ "$code" -eq 0 ] || fail "a container ended with $code"
done

# shellcheck disable=SC2086
docker inspect $all >"$work/inspect.json"
python3 -B tests/e2e/docker_check.py fleet "$work" "$peak" || fail "see above"
say "passed, $(($(date +%s) - start)) s after the images were ready"

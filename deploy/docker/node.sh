#!/bin/sh
# Starts the agent of a container; joins the fleet first when the node belongs to none.
#
#   FLEETUNE_JOIN      join URL from `fleetune-coordinator token`; when it is not set, the first
#                      line of /fleet/invite/url is awaited
#   FLEETUNE_NAME      what to call the node (default: its text's name when it took one, else the
#                      container's host name)
#   FLEETUNE_TEXT      its private text, a file or a folder (default /text)
#   FLEETUNE_TAKE_ONE  when set: FLEETUNE_TEXT is a folder for the whole fleet, and this node takes
#                      one file of it that no other node has. For fleets on one machine.
#   FLEETUNE_LIMITS_MEMORY, FLEETUNE_LIMITS_THREADS, ...: any setting of
#                      `fleetune-node run --sample-config`, as FLEETUNE_SECTION_KEY
#
#   healthy            is the agent alive, and did it say so within two minutes?
#   model IN OUT       compresses a model once, with FLEETUNE_COMPRESS as options of `compress`
#   anything else      is a command of fleetune-node itself
set -eu
umask 077
state="${FLEETUNE_STATE:-/var/lib/fleetune}"
text="${FLEETUNE_TEXT:-/text}"

fail() {
    echo "fleetune: $*" >&2
    exit 1
}

# The shell is process 1, which ignores signals that it does not trap.
trap 'exit 143' TERM INT

take_one() {
    [ -d "$text" ] || fail "FLEETUNE_TAKE_ONE needs a folder of texts at $text"
    if [ ! -s "$state/text" ]; then
        for file in "$text"/*.txt; do
            # mkdir either makes the folder or fails: two nodes never take the same text.
            if [ -f "$file" ] && mkdir "/fleet/claims/${file##*/}" 2>/dev/null; then
                printf '%s\n' "$file" >"$state/text.part"
                mv "$state/text.part" "$state/text"
                break
            fi
        done
    fi
    [ -s "$state/text" ] || fail "every text in $text is taken: add files *.txt, or fewer nodes"
    read -r text <"$state/text"
}

join_fleet() {
    url="${FLEETUNE_JOIN:-}"
    waited=0
    while [ -z "$url" ]; do
        [ -s /fleet/invite/url ] && read -r url </fleet/invite/url && break
        [ "$waited" -lt 120 ] ||
            fail "no join URL: set FLEETUNE_JOIN to what \`fleetune-coordinator token\` prints"
        sleep 1
        waited=$((waited + 1))
    done
    fleetune-node join "$url" --name "${FLEETUNE_NAME:-$1}" --state "$state" &
    wait $!
}

case "${1:-}" in
healthy)
    fleetune-node status --state "$state" --json | grep -q '"running": *true' || exit 1
    [ -n "$(find "$state/status.json" -newermt '2 minutes ago')" ] || exit 1
    exit 0
    ;;
model)
    [ $# -eq 3 ] || fail "usage: model IN OUT"
    in="$2" out="$3"
    [ -s "$out" ] && exit 0
    [ -r "$in" ] || fail "$in cannot be read by user $(id -u): mount a GGUF file there"
    rm -f "$out.part"
    # shellcheck disable=SC2086
    fleetune-node compress "$in" --out "$out.part" ${FLEETUNE_COMPRESS:-} &
    wait $!
    mv "$out.part" "$out"
    exit 0
    ;;
'' | -*) ;;
*) exec fleetune-node "$@" ;;
esac

name=
if [ -n "${FLEETUNE_TAKE_ONE:-}" ]; then
    take_one
    name="${text##*/}"
    name="${name%.txt}"
fi
[ -s "$state/enrolment.ini" ] || join_fleet "$name"
exec fleetune-node run --state "$state" --data "$text" "$@"

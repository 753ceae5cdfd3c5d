#!/bin/sh
# Starts the coordinator of a container; makes its state first when there is none.
#
#   FLEETUNE_MODEL_FILE   compressed model of the fleet (default /fleet/model/model.gguf)
#   FLEETUNE_INIT         options of `fleetune-coordinator init`, used once
#   FLEETUNE_INVITE_USES  when set: leaves a join URL for so many nodes, which need no approval, in
#                         /fleet/invite/url. Whoever can read that volume can join.
#
# With arguments it is fleetune-coordinator itself: docker run ... fleetune-coordinator --help
set -eu
[ $# -eq 0 ] || exec fleetune-coordinator "$@"

umask 077
state="${FLEETUNE_STATE:-/var/lib/fleetune}/run"
invite=/fleet/invite/url

# What was cut short is taken up again: only a whole state gives a status.
if ! fleetune-coordinator status "$state" >/dev/null 2>&1; then
    # shellcheck disable=SC2086
    fleetune-coordinator init "$state" \
        --model "${FLEETUNE_MODEL_FILE:-/fleet/model/model.gguf}" ${FLEETUNE_INIT:-}
fi
if [ -n "${FLEETUNE_INVITE_USES:-}" ] && [ ! -s "$invite" ]; then
    fleetune-coordinator token "$state" --uses "$FLEETUNE_INVITE_USES" --auto-approve \
        >"$invite.part"
    mv "$invite.part" "$invite"
fi
exec fleetune-coordinator run "$state"

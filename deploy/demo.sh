#!/usr/bin/env bash
# A whole fleet on this machine, in a few minutes: installs what is missing, builds, gets
# SmolLM2-135M-Instruct, compresses it, starts a coordinator and three nodes that pair with it, lets
# each learn from a different private text, and shows what that did to their held-out losses.
#
#   deploy/demo.sh [--seed N] [--rounds N] [--steps N] [--data FOLDER] [--keep] [--json FILE]
#
# --data FOLDER   three or more .txt files, one a node, instead of texts that Debian brings
# --keep          leave the fleet's folder behind (its path is printed)
# --json FILE     the table's numbers for machines
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=deploy/packages.sh
. deploy/packages.sh
# shellcheck source=deploy/model.sh
. deploy/model.sh

seed=1 rounds=4 steps=40 data="" keep="" json=""
while [ $# -gt 0 ]; do
    case "$1" in
    --seed) seed="$2" && shift 2 ;;
    --rounds) rounds="$2" && shift 2 ;;
    --steps) steps="$2" && shift 2 ;;
    --data) data="$2" && shift 2 ;;
    --keep) keep=1 && shift ;;
    --json) json="$2" && shift 2 ;;
    *) sed -n '2,12s/^# \{0,1\}//p' "$0" && exit 2 ;;
    esac
done

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
started=$SECONDS

# Everything that is started is ended, whatever happens.
pids=()
stop_all() {
    for pid in "${pids[@]}"; do kill -TERM "$pid" 2>/dev/null || true; done
    for pid in "${pids[@]}"; do wait "$pid" 2>/dev/null || true; done
    pids=()
}
work="$(mktemp -d "${TMPDIR:-/tmp}/fleetune-demo.XXXXXX")"
finish() {
    status=$?
    stop_all
    if [ $status -ne 0 ]; then
        echo "the demo failed; its logs are in $work" >&2
    elif [ -z "$keep" ]; then
        rm -rf "$work"
    else
        echo "the fleet's folder: $work"
    fi
}
trap finish EXIT
trap 'exit 130' INT TERM

say "1  packages, programs, model"
# shellcheck disable=SC2086
install_packages $packages_build python3 python3-pip
[ -n "$data" ] || install_packages dict-jargon debian-policy
cmake --preset release >/dev/null
cmake --build --preset release --target fleetune-node fleetune-coordinator | tail -n 1
bin="$PWD/build/bin"
model="$(fetch_model)"
installed=$SECONDS

# Three private texts. Documents are separated as the programs expect: by <|endoftext|>.
say "2  three private texts"
names=()
if [ -n "$data" ]; then
    for file in "$data"/*.txt; do
        [ ${#names[@]} -lt 3 ] || break
        name="$(basename "$file" .txt)"
        names+=("$name")
        cp "$file" "$work/$name.txt"
    done
    [ ${#names[@]} -eq 3 ] || { echo "$data must hold at least three .txt files" >&2 && exit 2; }
else
    names=(jargon packages policy)
    # A dictionary of hacker slang: an entry begins in the first column, after an empty line.
    zcat /usr/share/dictd/jargon.dict.dz |
        awk 'NR > 40 && blank && /^[^ ]/ { print "<|endoftext|>" } { print; blank = /^$/ }' \
            >"$work/jargon.txt"
    # What the packages of this machine say of themselves.
    awk -v RS= '{ print $0 "\n<|endoftext|>" }' /var/lib/dpkg/status |
        grep -E '^(Package|Section|Description|Homepage| |<\|endoftext)' |
        grep -vE '^ /|^ [^ ]+ [0-9a-f]{32}' >"$work/packages.txt"
    # The Debian policy manual, a chapter heading a document.
    zcat /usr/share/doc/debian-policy/policy.txt.gz |
        awk '/^[0-9]+(\.[0-9]+)+\. / { print "<|endoftext|>" } { print }' >"$work/policy.txt"
fi
for name in "${names[@]}"; do
    iconv -c -f utf-8 -t utf-8 "$work/$name.txt" >"$work/clean" && mv "$work/clean" "$work/$name.txt"
    printf '  %-12s %7d bytes\n' "$name" "$(stat -c %s "$work/$name.txt")"
done

say "3  compression: every layer by what it can bear"
"$bin/fleetune-node" compress "$model" --out "$work/model.gguf" --bits 4 --seed "$seed"

# key JSON: a top-level number or string of a JSON object.
key() { python3 -c 'import json,sys; print(json.loads(sys.stdin.read())[sys.argv[1]])' "$1"; }
held() { # NAME TEXT [ADAPTER]: held-out loss
    "$bin/fleetune-node" eval "$work/model.gguf" --text "$work/$1.txt" --part held \
        --tokens 3000 ${2:+--adapter "$2"} --json
}

say "4  each node alone: the base, and tuning on its own text only"
for name in "${names[@]}"; do
    held "$name" >"$work/$name.base"
    "$bin/fleetune-node" tune "$work/model.gguf" --data "$work/$name.txt" --seed "$seed" \
        --out "$work/$name.local" --steps $((rounds * steps)) --sequence 128 --json \
        >"$work/$name.tune"
    held "$name" "$work/$name.local" >"$work/$name.after"
    printf '  %-12s %.3f -> %.3f nats a token\n' "$name" "$(key nll <"$work/$name.base")" \
        "$(key nll <"$work/$name.after")"
done

say "5  the fleet: a coordinator and three nodes"
"$bin/fleetune-coordinator" init "$work/coordinator" --model "$work/model.gguf" \
    --listen "tcp://127.0.0.1:*" --rounds "$rounds" --steps "$steps" --seed "$seed" --eval-tokens 512 \
    --updates-per-round 3 --min-updates 2 >/dev/null
"$bin/fleetune-coordinator" run "$work/coordinator" 2>"$work/coordinator.log" &
pids+=($!)
for _ in $(seq 100); do
    grep -q listening "$work/coordinator.log" && break
    sleep 0.1
done
url="$("$bin/fleetune-coordinator" token "$work/coordinator" --uses 3 --auto-approve | grep -m1 fleetune://)"
echo "  paired with ${url%%/a*}/..."
node_pids=()
for name in "${names[@]}"; do
    "$bin/fleetune-node" join "$url" --name "$name" --state "$work/$name.state" >/dev/null
done
for name in "${names[@]}"; do
    "$bin/fleetune-node" run --state "$work/$name.state" --data "$work/$name.txt" --threads 1 \
        2>"$work/$name.log" &
    pids+=($!)
    node_pids+=($!)
done

# A line that shows how far the rounds are, from the coordinator's own words.
progress() {
    "$bin/fleetune-coordinator" rounds "$work/coordinator" --json |
        python3 -c '
import json, sys
rounds = json.load(sys.stdin)["rounds"]
closed = [r for r in rounds if r.get("closed")]
print(len(closed))'
}
waited=0
while :; do
    closed="$(progress 2>/dev/null || echo 0)"
    bar="$(printf '%*s' "$((closed * 30 / rounds))" '' | tr ' ' '=')"
    [ -t 1 ] && printf '\r  rounds [%-30s] %d of %d' "$bar" "$closed" "$rounds"
    alive=0
    for pid in "${node_pids[@]}"; do kill -0 "$pid" 2>/dev/null && alive=1; done
    [ $alive -eq 1 ] || break
    waited=$((waited + 1))
    [ $waited -lt 900 ] || { echo "the rounds took too long" >&2 && exit 1; }
    sleep 1
done
printf '\r  rounds [%-30s] %d of %d\n' "$bar" "$closed" "$rounds"
"$bin/fleetune-coordinator" verify "$work/coordinator"

say "6  what it did"
for name in "${names[@]}"; do
    held "$name" "$work/$name.state/adapter" >"$work/$name.fleet"
    cp "$work/$name.state/status.json" "$work/$name.status"
done
python3 - "$work" "$json" "$seed" "${names[@]}" <<'PYTHON'
import json, pathlib, sys
work, out, seed, names = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4:]
read = lambda name, what: json.loads((work / f"{name}.{what}").read_text())
rows = []
for name in names:
    base, local, fleet, status = (read(name, w) for w in ("base", "after", "fleet", "status"))
    tuned = json.loads((work / f"{name}.tune").read_text().strip().splitlines()[-1])
    rows.append({"node": name, "base": base["nll"], "local": local["nll"], "fleet": fleet["nll"],
                 "last_exit": fleet["last_exit_nll"], "vote": fleet["vote"],
                 "bytes_up": status["bytes_up"], "bytes_down": status["bytes_down"],
                 "peak_rss_bytes": status["peak_rss_bytes"],
                 "tune_tokens_per_second": tuned["tokens_per_second"]})
print("  held-out loss, nats a token           base   local   fleet    gain     sent  received    peak")
for r in rows:
    print(f"  {r['node']:<32} {r['base']:9.3f} {r['local']:7.3f} {r['fleet']:7.3f} "
          f"{r['base'] - r['fleet']:7.3f} {r['bytes_up'] / 1e6:5.1f} MB {r['bytes_down'] / 1e6:6.1f} MB"
          f" {r['peak_rss_bytes'] / 1e6:4.0f} MB")
if out:
    pathlib.Path(out).write_text(json.dumps({"seed": seed, "nodes": rows}) + "\n")
worse = [r["node"] for r in rows if r["fleet"] >= r["base"]]
sys.exit(f"the held-out loss of {', '.join(worse)} did not fall" if worse else 0)
PYTHON
echo
echo "  $((SECONDS - started)) s in all, $((SECONDS - installed)) s after packages, build and download"

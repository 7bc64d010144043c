#!/usr/bin/env bash
# A cluster to try everything: Ray nodes and an S3-compatible server with a bucket `corp`, all on this machine.
#
#   cluster/local.sh                                  runs until Ctrl-C; prints what to export in another terminal
#   cluster/local.sh COMMAND...                       runs the command in that environment, then stops
#
# NODES (default 3, one of them the head), CPUS per node (default 2; logical, may exceed the cores), PYTHON (default
# .venv, then the PATH). Tables and inputs are in memory and are gone afterwards. The script stops what it has started
# and nothing else: each of its processes leads its own process group.
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
cd "$root"
nodes="${NODES:-3}" cpus="${CPUS:-2}"
python="${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || command -v python3)}"
bin="$(cd "$(dirname "$python")" && pwd)"
export PATH="$bin:$PATH"
# Short, because the path of a Unix socket may have at most 107 characters.
folder="$(mktemp -d /tmp/ppl-XXXXXX)"
groups=()

end() {
    trap - EXIT INT TERM
    for group in "${groups[@]}"; do kill -TERM -- "-$group" 2>/dev/null || true; done
    for _ in $(seq 50); do
        alive=0
        for group in "${groups[@]}"; do kill -0 -- "-$group" 2>/dev/null && alive=1; done
        [ "$alive" = 1 ] || break
        sleep 0.1
    done
    for group in "${groups[@]}"; do kill -KILL -- "-$group" 2>/dev/null || true; done
    rm -rf "$folder"
}
trap end EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

start() { # NAME COMMAND...
    setsid "${@:2}" >"$folder/$1.log" 2>&1 </dev/null &
    groups+=("$!")
}

mapfile -t ports < <(python - $((3 + 3 * nodes)) <<'PY'
import socket, sys
held = [socket.socket() for _ in range(int(sys.argv[1]))]
for one in held:
    one.bind(("127.0.0.1", 0))
print(*(one.getsockname()[1] for one in held), sep="\n")
PY
)
s3="${ports[0]}" gcs="${ports[1]}" dashboard="${ports[2]}"

(umask 077 && python -c 'import secrets; print(secrets.token_hex(32), end="")' >"$folder/token")
# The caller's own settings are neither used here nor printed below.
unset RAY_ADDRESS RAY_AUTH_TOKEN "${!AWS_@}"
export AWS_ENDPOINT_URL="http://127.0.0.1:$s3" AWS_ALLOW_HTTP=true AWS_REGION=us-east-1 AWS_DEFAULT_REGION=us-east-1
export AWS_ACCESS_KEY_ID=local AWS_SECRET_ACCESS_KEY=local AWS_EC2_METADATA_DISABLED=true
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$folder/token" RAY_USAGE_STATS_ENABLED=0
export RAY_API_SERVER_ADDRESS="http://127.0.0.1:$dashboard"
# The nodes import our code from here; in an image it is installed.
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

node() { # NUMBER FLAGS...
    local first=$((3 + 3 * $1))
    start "node-$1" ray start "${@:2}" --num-cpus="$cpus" --object-store-memory=100000000 --temp-dir="$folder/ray" \
        --dashboard-agent-listen-port="${ports[$first]}" --dashboard-agent-grpc-port="${ports[$((first + 1))]}" \
        --metrics-export-port="${ports[$((first + 2))]}" --disable-usage-stats --block
}

failed() { # print the logs when a process does not come up
    tail -n 30 "$folder"/*.log >&2
    exit 1
}

alive() { # COUNT: wait until that many nodes are alive
    python - "$1" <<'PY'
import json, os, sys, time, urllib.request

token = open(os.environ["RAY_AUTH_TOKEN_PATH"]).read()
url = os.environ["RAY_API_SERVER_ADDRESS"] + "/nodes?view=summary"
request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
until = time.monotonic() + 120
while time.monotonic() < until:
    with urllib.request.urlopen(request, timeout=30) as answer:
        found = json.load(answer)["data"]["summary"]
    if sum(one["raylet"].get("state") == "ALIVE" for one in found) == int(sys.argv[1]):
        sys.exit()
    time.sleep(0.5)
sys.exit("a node did not come up")
PY
}

start s3 moto_server -H 127.0.0.1 -p "$s3"
node 0 --head --port="$gcs" --dashboard-port="$dashboard"
# This job succeeds once head, dashboard and agent are up.
python -m jobs.submit --id ready --entrypoint true --patience-s 180 >"$folder/ready.log" 2>&1 || failed
# One after the other: nodes that start at the same moment take each other's sockets.
for number in $(seq 1 $((nodes - 1))); do
    node "$number" --address="127.0.0.1:$gcs"
    alive $((number + 1)) || failed
done
python -c 'import boto3; boto3.client("s3").create_bucket(Bucket="corp")' || failed

if [ $# -gt 0 ]; then
    "$@"
else
    echo "$nodes nodes and an S3 server are up, until Ctrl-C. In another terminal:"
    echo
    env | grep -E '^(AWS_|RAY_|PYTHONPATH=)' | sort | sed 's/^/    export /'
    echo
    sleep infinity &
    wait $!
fi

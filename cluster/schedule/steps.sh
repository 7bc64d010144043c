#!/usr/bin/env bash
# The steps of the nightly and the weekly schedule, for cron, Kubernetes, Airflow and Argo: the only file to edit.
#
#   steps.sh nightly DAY      all steps of a schedule, one after the other; DAY is when it was due, like 2026-12-06
#   steps.sh promote DAY      one step
#   steps.sh --list weekly    the names of its steps
#
# A step is a job on the cluster at RAY_API_SERVER_ADDRESS. Its id is made of the step and the day, so a schedule that
# fires twice runs once. A step that fails ends the schedule with its exit code. A refused plug (exit code 4) is not a
# failure: generate still answers with the live plug, and the schedule ends with 4 so that someone looks at it.
#
# WHERE=here runs the jobs on this machine instead; WHERE=print shows them.
set -euo pipefail
REFUSED=4

nightly="refresh generate"
weekly="refresh make_requests train evaluate promote generate"

corp="${CORP:-s3://corp}"
histories="$corp/histories"  # train/ and held-out/, split by user: no user is in both
store="$corp/persona/store"
encoder="${ENCODER:-BAAI/bge-base-en-v1.5}"
llm="${LLM:-Qwen/Qwen3-8B}"
refresh_flags="${REFRESH_FLAGS:---sync}"
requests_flags="${REQUESTS_FLAGS:-}"
train_flags="${TRAIN_FLAGS:---config large}"
evaluate_flags="${EVALUATE_FLAGS:-}"
generate_flags="${GENERATE_FLAGS:---beams 1}"

refresh() {
    submit refresh "jobs.embed --histories $histories/ --store $store --encoder $encoder $refresh_flags"
}

make_requests() {
    local requests="$corp/persona/requests/$day"
    submit requests-train "jobs.make_requests --histories $histories/train/ --out $requests/train $requests_flags" &&
        submit requests-held-out "jobs.make_requests --histories $histories/held-out/ --out $requests/held-out \
            $requests_flags"
}

train() {
    submit train "jobs.train $train_flags --requests $corp/persona/requests/$day/train --store $store --llm $llm \
        --run $day --runs $corp/persona/runs --plug $corp/persona/plugs/$day"
}

evaluate() {
    submit evaluate "jobs.evaluate --requests $corp/persona/requests/$day/held-out --store $store --losses-only \
        --plug $corp/persona/plugs/$day --out $corp/persona/evaluations/$day $evaluate_flags"
}

promote() {
    submit promote "jobs.plugs promote --store $store --plug $corp/persona/plugs/$day \
        --evaluation $corp/persona/evaluations/$day"
}

generate() {
    submit generate "jobs.generate --requests $corp/requests/ --store $store --plug live $generate_flags"
}

submit() { # NAME JOB
    local command
    command="python -m $(tr -s ' ' <<<"$2")"
    case "${WHERE:-cluster}" in
        cluster) python -m jobs.submit --id "$1-$day" --entrypoint "env PERSONA_GPUS=${GPUS:-0} $command" ;;
        here) echo "$command" >&2 && bash -c "$command" ;;
        print) echo "$command" ;;
    esac
}

schedule() { # STEPS...
    local step code verdict=0
    for step in "$@"; do
        code=0
        "$step" || code=$?
        [ "$code" = 0 ] || echo "steps.sh: $step ended with $code" >&2
        [ "$code" = 0 ] || [ "$code" = "$REFUSED" ] || exit "$code"
        [ "$code" = 0 ] || verdict="$code"
    done
    exit "$verdict"
}

case "${1:-}" in --list) what="${2:-}" ;; *) what="${1:-}" day="${2:-}" ;; esac
case "$what" in
    nightly | weekly) steps="${!what}" ;;
    refresh | make_requests | train | evaluate | promote | generate) steps="$what" ;;
    *) echo "steps.sh: give nightly, weekly or a step of them ($weekly), not '$what'" >&2 && exit 2 ;;
esac
[ "$1" != --list ] || { echo "$steps" | tr ' ' '\n' && exit 0; }
day="${day%%T*}" # a scheduler may give a time
# A CronJob of Kubernetes names its Job after the minute that it was due, counted since 1970.
[[ ! "$day" =~ ^(nightly|weekly)-([0-9]{8})$ ]] || day="$(date -u -d "@$((BASH_REMATCH[2] * 60))" +%F)"
[ -n "$day" ] || { echo "steps.sh: give the day that the schedule was due, like 2026-12-06" >&2 && exit 2; }
schedule $steps

#!/bin/bash
# Prepare a dataset on several machines that share a file system, by nothing but ssh, from the
# repository's root (the same path on all of them):
#
#   CONFIG=configs/X.yaml HOSTS="node1 node2 node3" bash docs/launch/preprocess_shards.sh [overrides]
#
# Without HOSTS the shards are made here, one after another, which shows that the result is the same.
set -euo pipefail

config=${CONFIG:?set CONFIG to an experiment file}
python=${PYTHON:-.venv/bin/python}
preprocess=$(printf '%q ' "$python" tools/preprocess.py --config "$config" "$@")

if [[ -z ${HOSTS:-} ]]; then
    shards=${SHARDS:-2}
    for ((shard = 0; shard < shards; shard++)); do
        bash -c "${preprocess}--shard $shard/$shards"
    done
else
    read -ra hosts <<<"$HOSTS"
    shards=${#hosts[@]}
    directory=$(printf '%q' "$PWD")
    jobs=()
    for shard in "${!hosts[@]}"; do
        ssh -n "${hosts[shard]}" "cd $directory && ${preprocess}--shard $shard/$shards" &
        jobs+=($!)
    done
    failed=0
    for shard in "${!jobs[@]}"; do
        wait "${jobs[shard]}" || { echo "shard $shard on ${hosts[shard]} failed" >&2; failed=1; }
    done
    if ((failed)); then
        echo "mend that and start again: complete shards are not done again" >&2
        exit 1
    fi
fi

bash -c "${preprocess}--merge $shards"

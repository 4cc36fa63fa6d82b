#!/bin/bash
# Prepare a dataset on many nodes of a Slurm cluster, from the repository's root:
#
#   CONFIG=configs/X.yaml SHARDS=16 bash docs/launch/preprocess_slurm.sh [overrides]
#
# An array of SHARDS jobs encodes every SHARDS-th block each, beside data.packed, which must lie
# where all nodes see it; then one job merges them. Started again after a failure, what is complete
# is not done again. Partition and account are those of SBATCH_PARTITION and SBATCH_ACCOUNT.
set -euo pipefail

config=${CONFIG:?set CONFIG to an experiment file}
shards=${SHARDS:?set SHARDS to the number of jobs}
python=${PYTHON:-.venv/bin/python}

cpus=${CPUS:-16}

# data.workers: a node may have more cores than the job was given.
preprocess=$(printf '%q ' "$python" tools/preprocess.py --config "$config" data.workers="$cpus" "$@")
resources=(--nodes=1 --ntasks=1 --cpus-per-task="$cpus" --mem="${MEMORY:-32G}" --time="${TIME:-1:00:00}")

# $SLURM_... is for the job to expand, not for this script.
# shellcheck disable=SC2016
array=$(sbatch --parsable --job-name=preprocess --array="0-$((shards - 1))" \
    "${resources[@]}" \
    --wrap="srun ${preprocess}"'--shard "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT"')

# "array;cluster" where there are several clusters.
sbatch --job-name=preprocess-merge --dependency="afterok:${array%%;*}" --kill-on-invalid-dep=yes \
    "${resources[@]}" \
    --wrap="srun ${preprocess}--merge $shards"

#!/bin/bash
# The nightly benchmarks on one node of a Slurm cluster, from the repository's root:
#
#   DATA=DIR sbatch docs/launch/nightly_slurm.sh [options of tools/nightly.py]
#
# TIER is gpu1 unless set; for the cluster tier add `--gpus-per-node 8` to sbatch. DATA and the
# repository must lie where the node sees them. It is submitted again for the next day before it
# begins, so that a night that crashes does not end the nights. Partition and account are those of
# SBATCH_PARTITION and SBATCH_ACCOUNT.
#SBATCH --job-name=nightly
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=1
#SBATCH --exclusive
#SBATCH --time=8:00:00
#SBATCH --dependency=singleton
set -euo pipefail

data=${DATA:?set DATA to the folder of the data}
tier=${TIER:-gpu1}

sbatch --begin=tomorrow --gpus-per-node="${SLURM_GPUS_PER_NODE:-1}" docs/launch/nightly_slurm.sh "$@"
git pull --quiet --ff-only
srun "${PYTHON:-.venv/bin/python}" tools/nightly.py --tier "$tier" --data "$data" "$@"

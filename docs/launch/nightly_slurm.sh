#!/bin/bash
# The nightly benchmarks on one node of a Slurm cluster, from the repository's root:
#
#   DATA=DIR sbatch docs/launch/nightly_slurm.sh [options of tools/nightly.py]
#
# It runs the gpu1 tier. DATA and the repository must lie where the node sees them. It is submitted
# again for the next day before it begins, so that a night that crashes does not end the nights.
# Partition and account are those of SBATCH_PARTITION and SBATCH_ACCOUNT.
#SBATCH --job-name=nightly
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=1
#SBATCH --exclusive
#SBATCH --time=8:00:00
#SBATCH --dependency=singleton
set -euo pipefail

data=${DATA:?set DATA to the folder of the data}

# A job that Slurm started again has submitted the next day's already.
if [ "${SLURM_RESTART_COUNT:-0}" -eq 0 ]; then
  sbatch --begin=tomorrow docs/launch/nightly_slurm.sh "$@"
fi
git pull --quiet --ff-only
srun "${PYTHON:-.venv/bin/python}" tools/nightly.py --tier gpu1 --data "$data" "$@"

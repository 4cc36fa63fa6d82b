#!/bin/bash
# Train on the nodes of a Slurm cluster, from the repository's root:
#
#   sbatch --nodes 8 docs/launch/train_slurm.sh configs/X.yaml [overrides]
#
# One torchrun a node starts a process for each of its 8 GPUs. Ten minutes before the time limit the
# run is asked to save and to stop; submitted again, it goes on. The packed dataset, the model and the
# run's folder must lie where all nodes see them. Partition and account are those of SBATCH_PARTITION
# and SBATCH_ACCOUNT.
#SBATCH --job-name=train
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@600
set -euo pipefail

config=${1:?give an experiment file, such as configs/X.yaml}
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)

# torchrun dies of USR1 unless it ignores it; its ranks hear it all the same. Each node has its number:
# the other rendezvous compares the clocks of the nodes, and leaves out one that is behind.
# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 bash -c 'trap "" USR1; exec "$0" --node-rank "$SLURM_NODEID" "$@"' \
    "${TORCHRUN:-.venv/bin/torchrun}" --nnodes "$SLURM_NNODES" --nproc-per-node 8 \
    --master-addr "$head" --master-port "$((20000 + SLURM_JOB_ID % 20000))" \
    mcore_sft/train.py --config "$config" "${@:2}"

#!/usr/bin/env bash
# Trains under SLURM, from the repository's root, and continues in the next slot when the time is over.
#     sbatch --nodes=4 configs/launch/slurm.sh CONFIG.toml --run.dir=/shared/runs/a --parallel.replicate=4
#SBATCH --job-name=ochat
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
# One task per node: torchrun, which starts one process per GPU. 120 s before the time is over, SLURM sends USR1 to this
# script; srun passes it to each torchrun, torchrun to its processes, which save and stop (exit code 138). torchrun then
# exits with 1, as after any failure, so this script remembers the signal to decide whether to requeue. A step and a save
# must take less than 120 s. torch before 2.12 always gives processes 30 s.
set -uo pipefail

export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=110
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export HEAD NODES="$SLURM_JOB_NUM_NODES" JOB="$SLURM_JOB_ID" PORT=$((20000 + SLURM_JOB_ID % 10000))

is_warned=
srun configs/launch/multi_node.sh "$@" &
job=$!
trap 'is_warned=yes; kill -USR1 "$job"' USR1
wait "$job"
status=$?
while kill -0 "$job" 2>/dev/null; do # the signal ended the wait, not the job
    wait "$job"
    status=$?
done
if [[ $status -ne 0 && $is_warned ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"

#!/usr/bin/env bash
# Trains on several machines: start the same line on each of them, with base, data and run.dir on a disk that all share.
#     HEAD=node1 NODES=2 configs/launch/multi_node.sh CONFIG.toml --run.dir=/shared/runs/a --parallel.replicate=2
# HEAD      one of the machines, by the name it has for itself; all must reach its PORT (29400)
# NODES     how many machines; --parallel.replicate=NODES keeps a copy of the model on each, its weights never leave it
# GPUS      processes on each; all cards unless given
# RESTARTS  how often torchrun starts again from the newest checkpoint when a process dies (3)
# JOB       tells runs apart that meet on one HEAD and PORT
# With several networks, GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the interface, as in `ip address`.
# `pkill -USR1 -f ochat.train` on one machine saves and stops on all.
set -euo pipefail
: "${HEAD:?the name of one machine, the same on all}" "${NODES:?the number of machines}"
exec torchrun --nnodes "$NODES" --nproc-per-node "${GPUS:-gpu}" --max-restarts "${RESTARTS:-3}" \
    --rdzv-backend c10d --rdzv-endpoint "$HEAD:${PORT:-29400}" --rdzv-id "${JOB:-ochat}" \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 -m ochat.train "$@"

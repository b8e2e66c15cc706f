#!/usr/bin/env bash
# Trains on several machines: run the same line on each, with base, data and run.dir on a shared disk.
#     HEAD=node1 NODES=2 configs/launch/multi_node.sh CONFIG.toml --run.dir=/shared/runs/a --parallel.replicate=2
# HEAD      the host name of one machine; all must reach its PORT (29400)
# NODES     the number of machines; --parallel.replicate=NODES keeps a copy of the model on each
# GPUS      processes per machine (all GPUs)
# RESTARTS  how often torchrun restarts from the newest checkpoint if a process dies (3)
# JOB       distinguishes runs that use the same HEAD and PORT
# On machines with several networks, set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to an interface of `ip address`.
# `pkill -USR1 -f ochat.train` on one machine saves and stops on all.
set -euo pipefail
: "${HEAD:?the name of one machine, the same on all}" "${NODES:?the number of machines}"
exec torchrun --nnodes "$NODES" --nproc-per-node "${GPUS:-gpu}" --max-restarts "${RESTARTS:-3}" \
    --rdzv-backend c10d --rdzv-endpoint "$HEAD:${PORT:-29400}" --rdzv-id "${JOB:-ochat}" \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 -m ochat.train "$@"

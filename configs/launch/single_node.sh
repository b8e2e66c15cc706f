#!/usr/bin/env bash
# Trains on the GPUs of this machine.
#     configs/launch/single_node.sh configs/llama3_8b_8gpu.toml --run.dir=runs/a
# GPUS      processes (all GPUs)
# RESTARTS  how often torchrun restarts from the newest checkpoint if a process dies (3)
# `pkill -USR1 -f ochat.train` saves and stops: torchrun passes the signal on, and does not restart.
set -euo pipefail
exec torchrun --standalone --nproc-per-node "${GPUS:-gpu}" --max-restarts "${RESTARTS:-3}" \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 -m ochat.train "$@"

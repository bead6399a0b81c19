#!/usr/bin/env bash
# What srun starts once on every node: the launcher, which starts the node's ranks.
#
#   node.sh torchrun|deepspeed SCRIPT [ARGUMENTS...]
set -euo pipefail
launcher=$1
shift
# A warning from slurm goes to all processes. Ranks have handlers of their own and write a checkpoint; their launcher has
# to outlive it, and a rank that is still starting must not die of it either. What is ignored is inherited.
trap '' USR1 TERM
case $launcher in
  torchrun)
    exec torchrun --nnodes "$SLURM_NNODES" --node-rank "$SLURM_NODEID" --nproc-per-node "$GPUS_PER_NODE" \
      --rdzv-backend static --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT" --rdzv-id "$SLURM_JOB_ID" "$@"
    ;;
  deepspeed)
    # Without ssh every node starts its own ranks; the list of nodes is slurm's.
    hosts=$(mktemp)
    for host in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
      echo "$host slots=$GPUS_PER_NODE"
    done >"$hosts"
    code=0
    # LOCAL_RANK tells a rank; a flag before the script's own would be one more than it was given.
    deepspeed --hostfile "$hosts" --no_ssh --no_local_rank --node_rank "$SLURM_NODEID" --master_addr "$MASTER_ADDR" \
      --master_port "$MASTER_PORT" "$@" || code=$?
    rm -f "$hosts"
    exit "$code"
    ;;
  *)
    echo "node.sh: no such launcher: $launcher" >&2
    exit 2
    ;;
esac

#!/usr/bin/env bash
# One node's part of a run over several, under torchrun. Any scheduler, or you, runs it once on each node, with the same
# arguments:
#   NNODES=4 NODE_RANK=0 MASTER_ADDR=host-of-node-0 [MASTER_PORT=29500] [NPROC=8] \
#     bash launch/torchrun_multinode.sh CONFIG [key=value ...]
# CONFIG, the data and run.dir lie on storage that all nodes share.
set -euo pipefail
source "$(dirname "$0")/outcome.sh"

for name in NNODES NODE_RANK MASTER_ADDR; do
  [ -n "${!name:-}" ] || fail "$name: not set; see the first lines of this script"
done
count_ranks
exit_as_the_run torchrun --nnodes "$NNODES" --node-rank "$NODE_RANK" --nproc-per-node "$NPROC" \
  --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}" -m lime_dist.cli train "$@"

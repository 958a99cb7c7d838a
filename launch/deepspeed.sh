#!/usr/bin/env bash
# DeepSpeed's launcher, for CONFIG and overrides [key=value ...]. All ranks on this node:
#   [NPROC=8] bash launch/deepspeed.sh CONFIG [key=value ...]
# Once, on any node, of the nodes in a file of launch/hostfile.sample's form; needs pdsh, and ssh without a password:
#   HOSTFILE=hosts bash launch/deepspeed.sh CONFIG [key=value ...]
# Without ssh: on each node, which is line NODE_RANK of the file, from 0:
#   HOSTFILE=hosts NODE_RANK=0 MASTER_ADDR=node-a bash launch/deepspeed.sh CONFIG [key=value ...]
# MASTER_PORT defaults to 29500. Started by ssh, ranks write how the run ended on their own nodes: let
# LIME_DIST_OUTCOME_FILE name a new file on shared storage, or start from a node of the hostfile.
set -euo pipefail
source "$(dirname "$0")/outcome.sh"

where=()
if [ -z "${HOSTFILE:-}" ]; then
  HOSTFILE="$(mktemp)" NODE_RANK=0 MASTER_ADDR=127.0.0.1
  count_ranks
  echo "localhost slots=$NPROC" > "$HOSTFILE"
fi
[ -z "${NODE_RANK:-}" ] || [ -n "${MASTER_ADDR:-}" ] || fail "MASTER_ADDR: not set; name the host of node 0"
[ -z "${NODE_RANK:-}" ] || where=(--no_ssh --node_rank "$NODE_RANK" --master_addr "${MASTER_ADDR:-}")

# `env` carries the file's name to ranks that ssh starts, which do not see this environment.
exit_as_the_run deepspeed --hostfile "$HOSTFILE" "${where[@]}" --master_port "${MASTER_PORT:-29500}" \
  --no_python --no_local_rank env LIME_DIST_OUTCOME_FILE="$LIME_DIST_OUTCOME_FILE" \
  "$(command -v python)" -m lime_dist.cli train "$@"

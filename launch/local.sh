#!/usr/bin/env bash
# All ranks on this node, under torchrun.
#   [NPROC=8] bash launch/local.sh CONFIG [key=value ...]
set -euo pipefail
source "$(dirname "$0")/outcome.sh"

count_ranks
exit_as_the_run torchrun --standalone --nproc-per-node "$NPROC" -m lime_dist.cli train "$@"

#!/usr/bin/env bash
# The tests, on a fresh machine too: makes the virtual environment first.
#   bash tests/run.sh [TIER] [pytest arguments]
# TIER: none, lint, format, types and the quick tests; then by name slow, slurm (a real cluster on this machine; needs
# slurm-wlm, munge and root), campaign (random cases: --cases N --seed S), product (every pattern under every layout,
# most of an hour), gpu (on this machine's GPUs; says what it skips), all (all but product).
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh

tier="${1:-}" select=()
case "$tier" in
  slow | slurm | campaign | product) select=(-m "$tier") ;;
  gpu) select=(-m gpu -rs) ;;
  all) select=(-m "not product") ;;
  *) tier="" ;;
esac
[ -z "$tier" ] || shift
if [ "$tier" = "" ] || [ "$tier" = all ]; then
  ruff check lime_dist tests
  ruff format --check lime_dist tests
  mypy
fi
exec python -m pytest "${select[@]}" "$@"

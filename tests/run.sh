#!/usr/bin/env bash
# All tests, on a fresh machine too: makes the virtual environment, then runs lint and pytest.
#   bash tests/run.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
ruff check lime_dist tests
python -m pytest "$@"

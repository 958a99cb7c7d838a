# shellcheck shell=bash
# Sourced by the launchers here. They exit as the run itself ended: 0 all steps done; 2 a mistake, which a restart would
# repeat; 75 stopped on request behind a complete checkpoint: start again; anything else: try again.
# torchrun and DeepSpeed's launcher make 1 of every rank's exit code, so the first rank that knows writes "CODE REASON"
# to a file (lime_dist/ending.py), of this node and this start unless the caller names another. Where none of this node's
# ranks wrote one, the launcher's own code counts.
export LIME_DIST_OUTCOME_FILE="${LIME_DIST_OUTCOME_FILE:-$(mktemp -d)/outcome}"

# Ranks on this node: NPROC if set, else its GPUs, else its cores.
ranks_here() {
  if [ -n "${NPROC:-}" ]; then
    echo "$NPROC"
  elif nvidia-smi -L > /dev/null 2>&1; then
    nvidia-smi -L | wc -l
  else
    nproc
  fi
}

# Run a launcher in a session of its own, pass TERM, INT and USR1 on to all of it as TERM, wait for its last process,
# exit as above.
exit_as_the_run() {
  local launcher code=0 reason=""
  setsid "$@" &
  launcher=$!
  trap 'kill -TERM -- "-$launcher" 2> /dev/null || kill -TERM "$launcher" 2> /dev/null || true' TERM INT USR1
  wait "$launcher" || code=$?
  while kill -0 -- "-$launcher" 2> /dev/null; do # a signal has ended the wait, or the launcher left before its ranks
    wait "$launcher" || code=$?
    sleep 0.1
  done
  if [ -f "$LIME_DIST_OUTCOME_FILE" ]; then read -r code reason < "$LIME_DIST_OUTCOME_FILE"; fi
  echo "$(basename "$0"): exit code $code${reason:+, $reason}" >&2
  exit "$code"
}

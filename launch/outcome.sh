# shellcheck shell=bash
# Sourced by the launchers here. They exit as the run itself ended: 0 all steps done; 2 a mistake, which a restart would
# repeat; 75 stopped on request after saving a complete checkpoint: start again; anything else: try again.
# torchrun and DeepSpeed's launcher make 1 of every rank's exit code, so the first rank that knows writes "CODE REASON"
# to a file (lime_dist/lifecycle/ending.py), of this node and this start unless the caller names another. Where none of this node's
# ranks wrote one, the launcher's own code counts.
unset POSIXLY_CORRECT && set +o posix # in which bash forgets a code after the first wait
export LIME_DIST_OUTCOME_FILE="${LIME_DIST_OUTCOME_FILE:-$(mktemp -d)/outcome}"

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # else torchrun sets it, and says so at length

# Sets NPROC, the ranks on this node, to its GPUs where the caller has not.
count_ranks() {
  if [ -z "${NPROC:-}" ]; then
    NPROC="$(nvidia-smi -L 2> /dev/null | wc -l)"
    [ "$NPROC" -gt 0 ] || fail "NPROC: not set, and there are no GPUs here; set it to the ranks of this node"
  fi
}

# A mistake of the user's.
fail() {
  echo "$(basename "$0"): $1" >&2
  exit 2
}

# Run a launcher in a session of its own, pass TERM, INT and USR1 on to all of it as TERM, and HUP as it is, wait for its last
# process, exit as above.
exit_as_the_run() {
  [ ! -e "$LIME_DIST_OUTCOME_FILE" ] || fail "LIME_DIST_OUTCOME_FILE: $LIME_DIST_OUTCOME_FILE is there already; name a new file"
  local launcher code=0 reason=""
  setsid "$@" &
  launcher=$!
  trap 'kill -TERM -- "-$launcher" 2> /dev/null || kill -TERM "$launcher" 2> /dev/null || true' TERM INT USR1
  trap 'exec > /dev/null 2>&1; kill -HUP -- "-$launcher" 2> /dev/null || true' HUP # the terminal has gone
  wait "$launcher" || code=$?
  while kill -0 -- "-$launcher" 2> /dev/null; do # a signal has ended the wait, or the launcher left before its ranks
    code=0
    wait "$launcher" || code=$?
    sleep 0.1
  done
  if [ -f "$LIME_DIST_OUTCOME_FILE" ]; then read -r code reason < "$LIME_DIST_OUTCOME_FILE"; fi
  echo "$(basename "$0"): exit code $code${reason:+, $reason}" >&2
  exit "$code"
}

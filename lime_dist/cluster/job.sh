#!/bin/bash
@SBATCH@
# Written by `lime-dist submit`. One start of a training: checks, ranks, and what follows when they have ended.
# shellcheck disable=SC2016,SC2317  # some text is expanded elsewhere; some functions are called by trap only
@VALUES@
# ---- from here on the same for every cluster, but for the lines of `setup` ----

((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || { echo "lime-dist: needs bash 4.4 on the nodes" >&2 && exit 2; }
unset POSIXLY_CORRECT # with which bash forgets a code after the first wait, and SLURM's clients read flags otherwise
set +o posix -uo pipefail
slurm_dir=$run_dir/slurm
history=$slurm_dir/history.tsv
outcome='' # where the ranks of this start write how they ended
began=''   # a file as old as this start
restart=0  # starts before this one since the submission
no_step='no step begun'
successor='' decision='' stop_requested='' term_cause='' step_pid='' clock_pid='' log_size=0
log=$slurm_dir/logs/$SLURM_JOB_ID.out # what this script and srun say

say() { printf '%s lime-dist: %s\n' "$(date -u +%FT%TZ)" "$*"; }

newest_step() { # of the complete checkpoints; 0: there is none
  local meta name newest=0
  for meta in "$run_dir"/checkpoints/step_*/meta.json; do
    name=${meta%/meta.json} name=${name##*/step_}
    if [[ -f $meta && $name =~ ^[0-9]+$ ]] && ((10#$name > newest)); then newest=$((10#$name)); fi
  done
  echo "$newest"
}

record() { # EVENT DETAIL: a line of the run's history
  printf '%s\t%s\t%s\t%s\t%s\t%s\n' "$(date -u +%FT%TZ)" "$SLURM_JOB_ID" "$restart" "$1" "$(newest_step)" "${2//$'\t'/ }" >>"$history"
}

earlier_starts() { # [PATTERN]: the newest checkpoint's step at each start since the submission, but for ends with PATTERN
  awk -F '\t' -v left_out="${1:-^$}" '
    $4 == "submitted" { n = 0 }
    $4 == "start" { step[n] = $5; key[n++] = $2 "." $3 }
    $4 == "end" { for (i = 0; i < n; i++) if (key[i] == $2 "." $3 && $6 ~ left_out) step[i] = "" }
    END { for (i = 0; i < n; i++) if (step[i] != "") print step[i] }' "$history"
}

lacks_progress() { # no new checkpoint in so many starts, but for those that were asked to stop before they could
  local counted
  mapfile -t counted < <(earlier_starts "^75 .*$no_step")
  ((${#counted[@]} >= max_starts_without_progress)) &&
    ! printf '%s\n' "${counted[@]: -max_starts_without_progress}" | grep -qvx "$(newest_step)"
}

nap() { # SECONDS: without a process that would outlive this one
  read -rt "$1" <> <(:) || :
}

await_submission() { # submit writes its line when sbatch has answered; this start may be quicker
  local try
  for try in {1..30}; do
    awk -F '\t' -v job="$SLURM_JOB_ID" '$2 == job && $4 == "submitted" { found = 1 } END { exit !found }' "$history" 2>/dev/null && return 0
    sleep 1
  done
  say "$history has no line of the submission after $try s; going on without"
}

bad_hosts() { # of the exclude file, with commas between
  [ -f "$exclude_file" ] && grep -xE '[A-Za-z0-9._-]+' "$exclude_file" | sort -u | paste -sd, -
}

# ---- what follows ----

queue_successor() { # chain: it waits in the queue now, so that it starts however this job ends, unless that is well
  local hosts exclude=()
  hosts=$(bad_hosts)
  [ -z "$hosts" ] || exclude=(--exclude="$hosts")
  successor=$(sbatch --parsable --dependency="afternotok:$SLURM_JOB_ID" --kill-on-invalid-dep=yes "${exclude[@]}" \
    "$slurm_dir/job.sbatch" successor) || say "sbatch refused the successor: this is the last start"
  successor=${successor%%;*}
  [ -z "$successor" ] || record successor "$successor"
}

cancel_successor() { # as long as it waits: on a node that was cut off this start may learn late that it runs already
  [ -z "$successor" ] || scancel --state=PENDING "$successor"
}

exclude_bad_hosts() { # JOB
  local hosts
  hosts=$(bad_hosts)
  [ -z "$hosts" ] || scontrol update JobId="$1" ExcNodeList="$hosts"
}

show_job() { # one line, a space before and after each word; nothing when SLURM does not answer
  local try job
  for try in {1..3}; do
    if job=$(timeout 5 scontrol show job "$SLURM_JOB_ID" -o); then echo " $job " && return 0; fi
    say "scontrol does not answer ($try)" >&2
  done
}

was_requeued() { # JOB: without this script's doing, by preemption, a node's failure or scontrol requeue
  [[ $1 =~ \ Restarts=([0-9]+)\  ]] && ((BASH_REMATCH[1] > ${SLURM_RESTART_COUNT:-0}))
}

requeue() {
  local job
  job=$(show_job)
  if was_requeued "$job"; then return 0; fi # SLURM gave up this node; the job's next start must go on
  # A scancel has come while SLURM was asked: its TERM is about to be handled, and must not be undone.
  if [[ -z $term_cause && -n $job && $job != *" JobState=RUNNING "* ]]; then return 1; fi
  trap '' TERM # the requeue sends TERM; what follows needs a moment more
  if ! send_requeue; then
    say "scontrol requeue was refused: this was the last start; cluster.requeue=chain does without it"
    return 1
  fi
  exclude_bad_hosts "$SLURM_JOB_ID"
  scontrol update JobId="$SLURM_JOB_ID" StartTime=now+10 # SLURM alone would wait two minutes
}

# In what a trap calls, a plain `return` would give the status from before the trap.
send_requeue() { # a controller that is just starting refuses it
  local try
  for try in {1..6}; do
    if timeout 60 scontrol requeue "$SLURM_JOB_ID"; then return 0; fi
    say "scontrol requeue failed ($try)"
    sleep 10
  done
  return 1
}

start_again() { # sets decision
  if ((restart >= max_restarts)); then
    say "max_restarts=$max_restarts reached"
    decision=gave-up
  elif [[ $mode = chain && -n $successor ]]; then
    exclude_bad_hosts "$successor" # of which this start may have found another
    decision=chained
  elif [[ $mode = requeue ]] && requeue; then
    decision=requeued
  else
    decision=failed
  fi
}

finish() { # CODE REASON: decide and record, unless a signal has, and leave
  local code=$1 reason=$2
  end_clock
  if [ -z "$decision" ]; then
    case $code in
      0) decision=finished ;;
      2) decision=failed && cancel_successor ;;
      *) start_again ;;
    esac
  fi
  [ -n "$term_cause" ] || record end "$code $reason -> $decision"
  say "exit code $code (${term_cause:+$term_cause: }$reason): $decision"
  exit "$code"
}

conclude() { # CODE REASON: unless the ranks know better than srun and torchrun, which make other codes of theirs
  local code=$1 reason=$2 told told_reason killed
  if [ -f "$outcome" ] && read -r told told_reason <"$outcome" && [[ $told =~ ^[0-9]+$ ]]; then
    code=$told reason=$told_reason
  elif ((code == 75)); then
    reason="asked to stop"
  fi
  case $code in
    0 | 2) ;;
    75) has_stepped || reason+=", $no_step" ;;
    *) killed=$(killed_rank) && reason=${killed:+$killed; }$reason ;; # the ranks that are left know only that one has gone
  esac
  finish "$code" "$reason"
}

killed_rank() { # what srun said of the first task that ended by a signal, before it ended the others itself
  local task='rank \2'
  [ "$launcher" = srun ] || task=torchrun
  tail -c "+$((log_size + 1))" "$log" 2>/dev/null | sed -nE "/^srun: ([^:]+: )*(Force )?Terminat(ing|ed) (StepId|job step)/q
    /: Exited with exit code /d; s/^srun: error: ([^ :]+): tasks? ([0-9,-]+): (.*)/$task on \1: \3/p" | head -n 1
}

give_up() { # REASON: before anything was started
  decision=gave-up
  finish 2 "$1"
}

# ---- signals ----

on_usr1() { # from the clock below, or from whoever wants the run to stop
  say "asked to stop; the ranks save and leave"
  stop_requested=1
  end_clock # a second signal would tell the ranks to leave at once
  [ -z "$step_pid" ] || hand_on_stop "$step_pid"
}

hand_on_stop() { # PID: of srun, which hands it to the tasks; before they listen it would kill them
  (
    until ranks_listen; do
      kill -0 "$1" 2>/dev/null || exit 0
      nap 1
    done
    kill -USR1 "$1" 2>/dev/null
  ) &
}

heartbeats() { # COMMAND...: the ranks' files of this start of which it is true
  find "$run_dir/heartbeat" -name 'rank_*.json' -newer "$began" -exec "$@" {} \; -print 2>/dev/null
}

ranks_listen() { # a rank catches signals from before its first heartbeat on; preflight leaves none
  (($(heartbeats true | wc -l) >= ranks_per_node * SLURM_NNODES))
}

has_stepped() { # some rank has begun a step in this start
  [ -n "$(heartbeats grep -qE '"step": [1-9]')" ]
}

find_term_cause() {
  local job
  job=$(show_job)
  if [ -z "$job" ]; then
    echo "unknown cause" # better one start too many than a run that ends unseen
  elif [[ $job = *" Reason=TimeLimit "* ]]; then
    echo "time limit"
  elif was_requeued "$job"; then
    echo "requeued by SLURM"
  elif [[ $job = *" Reason=NodeDown "* || $job = *" Reason=NodeFail "* ]]; then
    echo "node failure" # of a job that SLURM may not requeue
  elif [[ $job =~ \ PreemptTime=[0-9] ]]; then
    echo "preemption" # likewise
  else
    echo "cancelled"
  fi
}

on_term() { # decides and records at once: SLURM kills this script in KillWait seconds, whether the ranks have left or not
  local when=''
  trap '' TERM
  end_clock
  term_cause=$(find_term_cause)
  say "TERM from SLURM: $term_cause"
  has_stepped || when=", $no_step"
  case $term_cause in
    cancelled) decision=cancelled && cancel_successor ;;
    "requeued by SLURM") decision=requeued ;;
    *) start_again ;;
  esac
  record end "75 $term_cause$when -> $decision"
}

# ---- the clock ----

watch_clock() { # asks this script to stop so long before the time limit that a step and a save fit
  local now rest end='' seen='' wanted=$stop_lead most=0 measure_at=$time_limit
  trap '' USR1
  while :; do
    now=$(date +%s)
    end=$(end_time "${end:-$((now + time_limit))}")
    if [ "$end" != "$seen" ]; then # the limit may be moved at any time; most of what is left is for training
      seen=$end most=$(((end - now) / 3))
    fi
    rest=$((end - now - (wanted < most ? wanted : most)))
    if ((rest <= measure_at)); then # the nearer the end, the more often
      wanted=$(wanted_lead) rest=$((end - now - (wanted < most ? wanted : most))) measure_at=$((rest / 2))
    fi
    ((rest > 0)) || break
    nap $((rest < 30 ? rest : 30)) # SLURM looks as seldom
  done
  say "$((end - now)) s are left to the time limit"
  kill -USR1 $$
}

end_time() { # ELSE: of this job, in seconds since the epoch, as SLURM has it now
  local end
  end=$(SLURM_TIME_FORMAT=standard timeout 5 squeue -h -j "$SLURM_JOB_ID" -o %e 2>/dev/null)
  [[ $end =~ ^[0-9T:-]+$ ]] && date -d "$end" +%s 2>/dev/null || echo "$1"
}

wanted_lead() { # seconds, from the steps and saves that this run has measured
  local lead
  lead=$([ "$measure_lead" = yes ] && timeout 10 "${container[@]}" "$python" -m lime_dist.cluster.lead "$run_dir" 2>/dev/null)
  [[ $lead =~ ^[0-9]+$ ]] || lead=$stop_lead # such as outside of the container that has lime_dist
  echo "$lead"
}

end_clock() {
  [ -z "$clock_pid" ] || kill "$clock_pid" 2>/dev/null
  clock_pid=''
}

# ---- steps ----

run_step() { # COMMAND...: signals reach it while it runs; returns its code
  [[ -z $stop_requested && -z $term_cause ]] || return 75
  log_size=$(stat -c %s "$log" 2>/dev/null) || log_size=0
  env "${exports[@]}" "$@" &
  step_pid=$!
  [ -z "$stop_requested" ] || hand_on_stop "$step_pid" # it came between the two lines above
  while kill -0 "$step_pid" 2>/dev/null; do wait "$step_pid"; done # a trapped signal ends wait early
  wait "$step_pid"
  local code=$?
  step_pid=
  return "$code"
}

port_is_free() { # in no range that the kernel gives out, and nobody listens on this host
  local low high name
  read -r low high </proc/sys/net/ipv4/ip_local_port_range
  (($1 < low || $1 > high)) || return 1
  for name in 127.0.0.1 "$HOSTNAME"; do
    if (exec 3<>"/dev/tcp/$name/$1") 2>/dev/null; then return 1; fi
  done
}

choose_port() { # another one for each job and restart
  local offset port
  for offset in {0..999}; do
    port=$((10000 + (SLURM_JOB_ID * 50 + restart + offset) % 20000))
    if port_is_free "$port"; then break; fi
  done
  echo "$port"
}

describe() { # job, ranks and the listed variables, no others
  local index name value
  say "job $SLURM_JOB_ID, restart $restart of at most $max_restarts, from step $(newest_step), nodes $SLURM_JOB_NODELIST"
  for index in "${!hosts[@]}"; do
    say "${hosts[index]}: ranks $((index * ranks_per_node))-$(((index + 1) * ranks_per_node - 1))"
  done
  for name in "${shown[@]}"; do
    value=$(env "${exports[@]}" printenv "$name") && say "$name=${value@Q}"
  done
}

check_hosts() {
  local code
  run_step "${srun[@]}" "${container[@]}" "$python" -m lime_dist.cli preflight "$slurm_dir/config.yaml" \
    --exclude-file "$exclude_file"
  code=$?
  ((code == 0)) || conclude "$code" "preflight"
}

# Of one node, where launcher is torchrun. torchrun dies of USR1 and hands it to nobody, so it begins ignoring it and
# this shell tells its children, the ranks, which by then have their own handler.
node_script='
  trap "" USR1
  "$1" -m torch.distributed.run --nnodes="$SLURM_NNODES" --nproc-per-node="$2" --node-rank="$SLURM_NODEID" \
    --master-addr="${MASTER_ADDR:-$SLURM_LAUNCH_NODE_IPADDR}" --master-port="$MASTER_PORT" --max-restarts=0 --tee=3 -m lime_dist.cli "${@:3}" &
  agent=$!
  trap "kill -USR1 \$(cat /proc/$agent/task/$agent/children)" USR1
  trap : TERM # torchrun and the ranks get it too; this shell waits for them
  while kill -0 "$agent" 2>/dev/null; do wait "$agent"; done
  wait "$agent"
'

train() {
  local code logs arguments=(train "$slurm_dir/config.yaml")
  logs=${slurm_dir//%/%%}/logs/$SLURM_JOB_ID.$restart # srun reads %t and the like in it
  # A restart goes on from this run's checkpoints, whatever its first start began from.
  if ((restart > 0)) && [ "$(newest_step)" != "${steps[0]}" ]; then arguments+=(checkpoint.resume=auto); fi
  export TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE='[rank ${rank}] '
  if [ "$launcher" = srun ]; then
    run_step "${srun[@]}" --output="$logs.rank_%3t.log" "${container[@]}" "$python" -m lime_dist.cli "${arguments[@]}"
  else
    run_step "${srun[@]}" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --output="$logs.node_%3n.log" \
      ${cpus_per_task:+--cpus-per-task="$((cpus_per_task * ranks_per_node))"} \
      "${container[@]}" bash -c "$node_script" node "$python" "$ranks_per_node" "${arguments[@]}"
  fi
  code=$?
  conclude "$code" "exit code $code"
}

# ---- the start ----

trap on_usr1 USR1
trap on_term TERM
if [[ -z ${SLURM_RESTART_COUNT:-} && ${1:-} != successor ]]; then await_submission; fi
mapfile -t steps < <(earlier_starts)
restart=${#steps[@]}
((restart <= max_restarts)) || give_up "max_restarts=$max_restarts reached"
if lacks_progress; then give_up "no progress in $max_starts_without_progress starts"; fi
if ! record start "$SLURM_JOB_NODELIST"; then # without it nothing bounds the restarts
  say "$history cannot be written; see whether the disk is full"
  exit 2
fi
mkdir -p "$slurm_dir/logs" "$slurm_dir/outcomes"
outcome=$slurm_dir/outcomes/$SLURM_JOB_ID.$restart
export LIME_DIST_OUTCOME_FILE=$outcome
began=$outcome.began
: >"$began"
if [[ $mode = chain ]] && ((restart < max_restarts)); then queue_successor; fi

# Modules and setup are not written for `set -u`, and their variables must be global: hence no function.
set +u
for module in "${modules[@]}"; do
  module load "$module" || finish 2 "module load $module failed"
done
@SETUP@
set +e -u
trap on_usr1 USR1
trap on_term TERM

unset RANK LOCAL_RANK WORLD_SIZE MASTER_ADDR # a submitting shell's own would be taken for srun's
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
if ((${#hosts[@]})); then export MASTER_ADDR=${hosts[0]}; fi # without scontrol the ranks find it themselves
MASTER_PORT=$(choose_port)
LIME_DIST_JOB_SECRET=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n') && export LIME_DIST_JOB_SECRET # ranks sign with it
export MASTER_PORT OMP_NUM_THREADS=${OMP_NUM_THREADS:-${cpus_per_task:-1}}
# srun does not take it over from sbatch
if [ -n "$cpus_per_task" ]; then export SRUN_CPUS_PER_TASK=$cpus_per_task; fi
srun=(srun --export=ALL --kill-on-bad-exit=1 --wait=60 --distribution=block:block --open-mode=append "${srun_flags[@]}")
describe
watch_clock &
clock_pid=$!
disown
if [ "$preflight" = yes ]; then check_hosts; fi
train

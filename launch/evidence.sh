#!/usr/bin/env bash
# Does LIMe pay? Trains small models with and without it on this machine's CPU, and compares them; see docs/evidence.md.
#   bash launch/evidence.sh PART [key=value ...]      overrides go to every `lime-dist train`
# PART: depth (24 narrow layers on text), arithmetic (the paper's task); depth-rates, arithmetic-rates: by which learning rate.
# Runs are in runs/evidence/PART/VARIANT-seedN. One that is complete is kept, others go on from their last checkpoint.
# SEEDS: default "1 2 3". VARIANTS: some of the part's, the first being what the others are compared with; default all.
# JOBS: runs side by side, of one rank and one thread each; default 2.
set -euo pipefail
cd "$(dirname "$0")/.."

part="${1:-}"
[ $# -eq 0 ] || shift
seeds="${SEEDS:-1 2 3}"
most_jobs="${JOBS:-2}"
case "$part" in
  depth) variants=(llama lime lime-first2 lime-last2 lime-same-heads llama-lime-init) ;;
  arithmetic) variants=(llama lime lime-v1 llama-lime-init) ;;
  depth-rates)
    seeds=1 variants=({llama,lime}-lr{2e-3,4e-3,8e-3,1.6e-2,3.2e-2})
    set -- run.steps=500 "$@"
    ;;
  arithmetic-rates)
    seeds=1 variants=({llama,lime}-lr{1e-3,4e-3,8e-3,1.6e-2})
    set -- run.steps=800 eval.every=200 optim.warmup_steps=100 "$@"
    ;;
  *)
    echo "evidence.sh: ${part:-PART}: no such part; use depth, arithmetic, depth-rates or arithmetic-rates" >&2
    exit 2
    ;;
esac
for variant in ${VARIANTS:-}; do
  if [[ " ${variants[*]} " != *" $variant "* ]]; then
    echo "evidence.sh: VARIANTS: $variant is none of this part; use some of: ${variants[*]}" >&2
    exit 2
  fi
done
[ -z "${VARIANTS:-}" ] || read -ra variants <<< "$VARIANTS"
config="configs/evidence/${part%-rates}.yaml"
source launch/environment.sh
export OMP_NUM_THREADS=1

# The overrides of a variant, by the parts of its name.
overrides() {
  case "$1" in
    llama-lime-init*) echo "depth.pattern={}" ;; # no layer reads another; K and V begin as LIMe's do
    llama*) echo "depth.router=none" ;;
    lime-first2) echo "depth.pattern=first:2" ;;
    lime-last2) echo "depth.pattern=last:2" ;;
    lime-same-heads) echo "depth.heads=same" ;;
    lime-v1) echo "depth.entry=hidden" ;;
  esac
  case "$1" in *-lr*) echo "optim.lr=${1##*-lr}" ;; esac
}

make_depth_data() {
  local folder=runs/evidence/text split
  mkdir -p "$folder"
  [ -f "$folder/corpus/train.jsonl" ] && [ -f "$folder/corpus/valid.jsonl" ] ||
    lime-dist data build-corpus --packages --out "$folder/corpus" --overwrite
  [ -f "$folder/tokenizer.model" ] ||
    lime-dist data train-tokenizer --input "$folder/corpus/train.jsonl" --vocab-size 2048 --out "$folder/tokenizer"
  for split in train valid; do
    [ -f "$folder/$split.meta.json" ] ||
      lime-dist data tokenize --input "$folder/corpus/$split.jsonl" --tokenizer "$folder/tokenizer.model" \
        --out "$folder/$split" --overwrite
  done
}

make_arithmetic_data() {
  [ -f runs/evidence/expressions/valid.meta.json ] ||
    lime-dist data build-task arithmetic --out runs/evidence/expressions --overwrite
}

# The last step is done, and evaluated. Reads what the run has written, so that kept runs need no checkpoint.
is_complete() {
  [ -f "$1/config.yaml" ] && [ -f "$1/metrics.jsonl" ] &&
    grep -q "^{\"step\": $(sed -n 's/^  steps: //p' "$1/config.yaml"), \"eval_loss\"" "$1/metrics.jsonl"
}

train() {
  local variant="$1" seed="$2" run="runs/evidence/$part/$1-seed$2"
  shift 2
  if is_complete "$run"; then return; fi
  echo "$run"
  # shellcheck disable=SC2046 # one word each
  exec lime-dist train "$config" $(overrides "$variant") "$@" run.dir="$run" run.seed="$seed" > "$run.log" 2>&1
}

"make_${part%-rates}_data"
mkdir -p "runs/evidence/$part"
trap 'kill $(jobs -rp) 2> /dev/null || true' EXIT # each saves a checkpoint
trap 'exit 130' INT TERM
for seed in $seeds; do
  for variant in "${variants[@]}"; do
    while [ "$(jobs -rp | wc -l)" -ge "$most_jobs" ]; do wait -n || true; done
    train "$variant" "$seed" "$@" &
  done
done
wait

runs=()
for variant in "${variants[@]}"; do # the first is what the others are compared with
  for seed in $seeds; do
    run="runs/evidence/$part/$variant-seed$seed"
    is_complete "$run" || { tail -n 3 "$run.log" >&2; echo "evidence.sh: $run did not end; its log is $run.log" >&2; exit 1; }
    runs+=("$run")
  done
done

# report FILE COMMAND ...: what the command prints as $run/FILE, once.
report() {
  local file="$run/$1"
  [ -f "$file" ] || "${@:2}" > "$file.part"
  [ -f "$file" ] || mv "$file.part" "$file"
}

if [ "$part" = arithmetic ]; then
  for run in "${runs[@]}"; do report accuracy.json lime-dist eval "$run/config.yaml" --task --json; done
  python launch/mean_accuracy.py "${runs[@]}"
fi
if [[ "$part" != *-rates ]]; then
  text=() # the held-out text has too few of the words to be told apart
  [ "$part" = arithmetic ] || text=(--text runs/evidence/text/corpus/train.jsonl)
  analyzed=()
  for run in "${runs[@]}"; do
    case "${run##*/}" in llama-seed* | lime-seed* | llama-lime-init-seed*) analyzed+=("$run") ;; esac
  done
  for run in "${analyzed[@]}"; do report analysis.json lime-dist analyze "$run" "${text[@]}" --json; done
  [ ${#analyzed[@]} -eq 0 ] || python launch/mean_analyses.py "${analyzed[@]}"
fi
lime-dist compare "${runs[@]}" --svg "runs/evidence/$part.svg" --html "runs/evidence/$part.html"
lime-dist compare "${runs[@]}" --json > "runs/evidence/$part.json"

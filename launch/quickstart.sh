#!/usr/bin/env bash
# From nothing to a trained LIMe model: environment, corpus, tokenizer, token files, training over four local ranks,
# evaluation, continuations of prompts, and pictures of what it learned. A second run re-uses whatever is there.
#   bash launch/quickstart.sh [key=value ...]      overrides go to `lime-dist train`
set -euo pipefail
cd "$(dirname "$0")/.."

source launch/environment.sh
data=runs/quickstart/data
mkdir -p "$data"

[ -f "$data/corpus/train.jsonl" ] && [ -f "$data/corpus/valid.jsonl" ] ||
  lime-dist data build-corpus --out "$data/corpus" --overwrite
[ -f "$data/tokenizer.model" ] ||
  lime-dist data train-tokenizer --input "$data/corpus/train.jsonl" --vocab-size 2048 --out "$data/tokenizer"
for split in train valid; do
  [ -f "$data/$split.meta.json" ] ||
    lime-dist data tokenize --input "$data/corpus/$split.jsonl" --tokenizer "$data/tokenizer.model" \
      --out "$data/$split" --overwrite
done

run=runs/quickstart
for override in "$@"; do
  case "$override" in run.dir=*) run=${override#run.dir=} ;; esac
done

lime-dist train configs/quickstart.yaml --dry-run "$@" | sed -n '/^layout/,$p'
lime-dist train configs/quickstart.yaml "$@"
lime-dist eval configs/quickstart.yaml "$@"
seed=0
for prompt in "The function returns" "Raises ValueError if" "class "; do
  lime-dist generate "$run" --prompt "$prompt" --max-new-tokens 50 --temperature 0.6 --top-p 0.9 --seed $((++seed))
  echo
done
lime-dist analyze "$run" --html "$run/analysis.html"
echo "The loss curve, the router map and the rest as pictures: $run/analysis.html (opens offline)."
echo "The run is in $run (tensorboard --logdir $run). Next: README.md, From a laptop to a cluster."

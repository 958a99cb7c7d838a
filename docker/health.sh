#!/usr/bin/env bash
# Does this installation train? Two steps of a small model on a corpus made here: a stage on each GPU, or two on the CPU.
#   bash docker/health.sh
set -euo pipefail
config="$(cd "$(dirname "$0")/.." && pwd)/configs/quickstart.yaml"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
cd "$work"

lime-dist data build-corpus --out corpus
head -n 100 corpus/train.jsonl > small.jsonl
lime-dist data train-tokenizer --input small.jsonl --vocab-size 512 --out tokenizer
lime-dist data tokenize --input small.jsonl --tokenizer tokenizer.model --out tokens

stages="$(python -c 'import torch; print(torch.cuda.device_count() or 2)')"
lime-dist train "$config" parallel.tp=1 "parallel.pp=$stages" "model.num_layers=$stages" model.vocab_size=512 \
  data.train=tokens data.valid=tokens data.tokenizer=tokenizer.model eval.batches=1 run.dir=run run.steps=2
echo "healthy: two steps on $stages stages"

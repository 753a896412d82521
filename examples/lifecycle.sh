#!/usr/bin/env bash
# A mixture from its first step to an answer over HTTP: train, look inside, remove experts, tune with
# adapters, pack, serve, ask. Each step prints its numbers.
#
#   examples/lifecycle.sh [FOLDER]            about 10 minutes on two cores; FOLDER must be new
#   QUICK=1 examples/lifecycle.sh [FOLDER]    a minute, with a model that has learned next to nothing
set -euo pipefail
out=$(realpath -m "${1:-$(dirname "$0")/../runs/lifecycle}")
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
moestro() { "$python" -m moestro "$@"; }
step() { printf '\n== %s\n' "$1"; }

if [ -e "$out" ]; then
  echo "$out exists already; give a new folder" >&2
  exit 2
fi
train=(--set train.steps=800)
tune=(--epochs 1)
most=10000 tokens=32768 calibration=65536
if [ -n "${QUICK:-}" ]; then
  train=(
    --set 'data.sources=["docs"]' --set data.domains=none --set train.steps=20 --set train.eval_every=20
    --set train.eval_tokens=2048 --set model.dim=32 --set model.num_layers=2
    --set model.moe.hidden_dim=32 --set model.moe.num_experts=8
  )
  tune=(--steps 20 --set train.eval_every=20 --set train.eval_tokens=2048)
  most=100 tokens=2048 calibration=4096
fi

step "train"
moestro train --out "$out/mixture" "${train[@]}"

step "probe: which expert does what"
moestro probe "$out/mixture" --tokens "$tokens"

step "prune: a quarter of the experts"
moestro prune "$out/mixture" "$out/pruned" --keep 0.75 --tokens "$tokens" --calibration "$calibration"

step "tune with adapters, on questions about the standard library"
"$python" examples/library_chats.py "$out/chats" --plain --most "$most"
moestro tune "$out/pruned" --data "$out/chats/train.jsonl" --out "$out/tuned" --lora 8 \
  --set data.seq_len=256 --set optim.lr=2e-3 "${tune[@]}"
moestro convert "$out/tuned" "$out/merged" --to hf

step "pack: what the assistant says about modules that it has not seen, before, after and packed"
held=("--chats" "$out/chats/held.jsonl" --tokens "$tokens" --weights bf16)
moestro eval "$out/pruned" "${held[@]}"
moestro eval "$out/merged" "${held[@]}" --weights int8 --weights int4

step "serve"
"$python" -m moestro serve "$out/merged" --weights int8 --port 0 > "$out/serve.log" &
server=$!
trap 'kill "$server" 2> /dev/null || true' EXIT
until grep -q '^ready' "$out/serve.log"; do
  kill -0 "$server"
  sleep 0.2
done
cat "$out/serve.log"

step "ask"
"$python" - "$(grep -o 'http://[^ /]*' "$out/serve.log" | head -n 1)" << 'END'
import json, sys, time, urllib.request

question = "What does wrap(text, width=70, **kwargs) of textwrap do?"
body = {"prompt": f"Question: {question}\nAnswer:", "max_tokens": 120, "temperature": 0}
request = urllib.request.Request(
    f"{sys.argv[1]}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
)
started = time.perf_counter()
answer = json.load(urllib.request.urlopen(request))
seconds, tokens = time.perf_counter() - started, answer["usage"]["completion_tokens"]
print(question, answer["choices"][0]["text"], sep="\n")
print(f"{tokens} tokens in {seconds:.2f} s")
END
kill "$server"
wait "$server"

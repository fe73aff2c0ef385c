#!/usr/bin/env bash
# Train one stage on N processes of this machine, joined by jax.distributed.
#
#   launch/local.sh N --config=FILE.py:stage=NAME --workdir=DIR [--config.key=value ...]
#   launch/local.sh 2 --config=configs/quickstart.py:stage=pair --workdir=runs/quickstart
#   launch/local.sh --dry-run 2 ...        print the commands, run nothing
#
# The batches are those of one process, functions of the seed and the step; so are the losses, up to the rounding of sums
# in another order. Each process logs to
# WORKDIR.logs/process-K.log; process 0 also shows its progress here. The first failure ends all of them.
# EMBED names the command (default: embed), PORT the coordinator's port (default: a free one).
set -euo pipefail

dry_run=false
if [[ "${1:-}" == --dry-run ]]; then dry_run=true; shift; fi
if [[ ! "${1:-}" =~ ^[1-9][0-9]*$ || $# -lt 3 ]]; then
  sed -n '2,12s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
processes=$1; shift
workdir=
for argument in "$@"; do
  case "$argument" in --workdir=*) workdir=${argument#--workdir=} ;; esac
done
if [[ -z "$workdir" ]]; then echo "launch/local.sh: --workdir=DIR is missing" >&2; exit 2; fi

embed=${EMBED:-embed}
port=${PORT:-$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')}
command=("$embed" train "$@" "--coordinator=127.0.0.1:$port" "--num_processes=$processes")

if $dry_run; then
  for ((k = 0; k < processes; k++)); do echo "${command[*]} --process_id=$k"; done
  exit 0
fi

mkdir -p "$workdir.logs"
pids=()
trap 'kill "${pids[@]}" 2>/dev/null || true' EXIT
for ((k = 0; k < processes; k++)); do
  if ((k == 0)); then
    "${command[@]}" --process_id=0 > >(tee "$workdir.logs/process-0.log") 2>&1 &
  else
    "${command[@]}" "--process_id=$k" >"$workdir.logs/process-$k.log" 2>&1 &
  fi
  pids+=($!)
done
for ((k = 0; k < processes; k++)); do
  if ! wait -n; then
    echo "launch/local.sh: a process failed; see $workdir.logs/" >&2
    exit 1
  fi
done

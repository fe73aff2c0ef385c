#!/usr/bin/env bash
# Run a verb of embed in N processes on this machine, joined by jax.distributed.
#
#   launch/local.sh N -- VERB ARGUMENTS...
#   launch/local.sh 2 -- train --config=configs/quickstart.py:stage=pair --workdir=runs/quickstart
#   launch/local.sh 2 --dry-run -- ...     print the commands, run nothing
#
# The results are those of one process, except for rounding, because sums are computed in another order. Each process
# logs to process-K.log in LOGS (default: WORKDIR.logs if the workdir is a folder, otherwise a new folder, which is
# printed); process 0 also prints its output here. SIGTERM or Ctrl-C goes to all processes: training saves and ends with
# code 143, and the same command continues. If a process fails, the others have GRACE seconds (default 70) to end by
# themselves; the exit code is that of the first to fail.
# EMBED is the command (default: embed), PORT the port of the coordinator (default: a free one), EMBED_RUN_ID the run.
source "$(dirname "$0")/common.sh"

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 501)); then die "needs bash 5.1 or later, this is $BASH_VERSION"; fi
options "" "$@"
processes=${words[0]:-}
[[ "$processes" =~ ^[1-9][0-9]{0,3}$ ]] || die "N=$processes must be a whole number of processes, at least 1"
need_verb

port=${PORT:-$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')}
command=("${EMBED:-embed}" "${arguments[@]}" "--coordinator=127.0.0.1:$port" "--num_processes=$processes")

if $dry_run; then
  for ((k = 0; k < processes; k++)); do quoted "${command[@]}" "--process_id=$k"; done
  exit 0
fi

export EMBED_COMMIT=$commit EMBED_RUN_ID=${EMBED_RUN_ID:-local-$(date +%Y%m%d-%H%M%S)-$commit}
logs=$(log_folder)
logs=${logs:-$(mktemp -d "${TMPDIR:-/tmp}/embed-logs-XXXXXX")}
mkdir -p "$logs"
echo "launch/local.sh: logs in $logs/" >&2
pids=() stopping=false
trap 'stopping=true; kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT
trap 'kill -KILL "${pids[@]}" ${timer:+"$timer"} 2>/dev/null || true' EXIT
for ((k = 0; k < processes; k++)); do
  if ((k == 0)); then
    # -i: Ctrl-C reaches tee too, and process 0 would lose its output while it saves.
    "${command[@]}" --process_id=0 > >(tee -i "$logs/process-0.log") 2>&1 &
  else
    "${command[@]}" "--process_id=$k" >"$logs/process-$k.log" 2>&1 &
  fi
  pids+=($!)
done
if $stopping; then kill -TERM "${pids[@]}" 2>/dev/null || true; fi # processes started after the signal

code=0 timer=
while ((${#pids[@]})); do
  status=0 ended=
  wait -n -p ended "${pids[@]}" ${timer:+"$timer"} || status=$?
  if [[ -z "${ended:-}" ]]; then continue; fi # a signal ended the wait, not a process
  if [[ "$ended" == "$timer" ]]; then
    kill -KILL "${pids[@]}" 2>/dev/null || true
    timer=
    continue
  fi
  for k in "${!pids[@]}"; do if [[ "${pids[k]}" == "$ended" ]]; then unset "pids[k]"; fi; done
  if ((status && !code)); then
    code=$status
    if ((code != 143)); then
      echo "launch/local.sh: a process ended with code $code; see $logs/" >&2
      # jax's handler keeps a process alive after SIGTERM, and a process that waits for a dead peer does not check it.
      sleep "${GRACE:-70}" >/dev/null 2>&1 &
      timer=$!
    fi
  fi
done
exit "$code"

#!/usr/bin/env bash
# Run a verb of embed in N processes of this machine, joined by jax.distributed.
#
#   launch/local.sh N -- VERB ARGUMENTS...
#   launch/local.sh 2 -- train --config=configs/quickstart.py:stage=pair --workdir=runs/quickstart
#   launch/local.sh 2 --dry-run -- ...     print the commands, run nothing
#
# What is computed is that of one process, up to the rounding of sums in another order. Each process logs to
# process-K.log in LOGS (default: WORKDIR.logs where the workdir is a folder, otherwise a new folder that is named here);
# process 0 also shows its output here. SIGTERM, or Ctrl-C, goes to all of them: training saves and ends (code 143), and
# the same command continues. Where one fails the others have GRACE seconds (default 70) to end by themselves; the exit code is
# that of the first to fail.
# EMBED names the command (default: embed), PORT the coordinator's port (default: a free one), EMBED_RUN_ID the run.
source "$(dirname "$0")/common.sh"

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 501)); then die "needs bash 5.1 or later; this is $BASH_VERSION"; fi
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
    # -i: Ctrl-C reaches tee too, and process 0 would lose its output where it is to save.
    "${command[@]}" --process_id=0 > >(tee -i "$logs/process-0.log") 2>&1 &
  else
    "${command[@]}" "--process_id=$k" >"$logs/process-$k.log" 2>&1 &
  fi
  pids+=($!)
done
if $stopping; then kill -TERM "${pids[@]}" 2>/dev/null || true; fi # those that were started after the signal

code=0 timer=
while ((${#pids[@]})); do
  status=0 ended=
  wait -n -p ended "${pids[@]}" ${timer:+"$timer"} || status=$?
  if [[ -z "${ended:-}" ]]; then continue; fi # a signal ended the wait, no process
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
      # jax's own handler keeps a process alive through SIGTERM, and one that waits for a dead peer reads no flag.
      sleep "${GRACE:-70}" >/dev/null 2>&1 &
      timer=$!
    fi
  fi
done
exit "$code"

#!/usr/bin/env bash
# Run a verb of embed on GPUs of a Slurm cluster, one process per GPU.
#
#   launch/slurm.sh submit --nodes=N --gpus=GPUS_PER_NODE [--name=embed] [--time=24:00:00] [--partition=P] [--account=A]
#                          [--cpus=CPUS_PER_GPU] [--run-id=ID] -- VERB ARGUMENTS...
#   launch/slurm.sh list
#   launch/slurm.sh logs --job=JOB --workdir=DIR
#   launch/slurm.sh stop --job=JOB                   training saves, then ends
#   --dry-run with any of them                       print the commands and the batch script, run nothing
#
#   launch/slurm.sh submit --nodes=4 --gpus=8 \
#       -- train --config=configs/pplx_embed.py:stage=pair --workdir=/shared/runs/pplx_embed
#
# Runs in this clone with the environment of `make`; the variable EMBED names another command. The clone and all output
# folders must be on a file system that all nodes share. The job saves and returns to the queue five minutes before its
# time limit, when it is preempted, and when a process is lost. Its log is slurm-JOB.log in WORKDIR.logs, or in the
# folder of the variable LOGS, which is required without a workdir and for a workdir in a bucket.
source "$(dirname "$0")/common.sh"

nodes='' gpus='' name=embed time=24:00:00 partition='' account='' cpus=8 run_id='' job='' workdir=''
options "nodes gpus name time partition account cpus run_id job workdir" "$@"
need_command
need_number nodes gpus cpus job

batch_script() {
  cat <<SCRIPT
#!/usr/bin/env bash
#SBATCH --job-name=$name
#SBATCH --nodes=$nodes
#SBATCH --ntasks-per-node=$gpus
#SBATCH --gpus-per-node=$gpus
#SBATCH --cpus-per-task=$cpus
#SBATCH --time=$time
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@300
SCRIPT
  if [[ -n "$partition" ]]; then echo "#SBATCH --partition=$partition"; fi
  if [[ -n "$account" ]]; then echo "#SBATCH --account=$account"; fi
  cat <<SCRIPT
cd $(quoted "$root")
# When a process dies, the others notice within a minute and end with the exit code that is needed here.
# --kill-on-bad-exit=1 would kill them at once, with code 137.
export EMBED_RUN_ID=$(quoted "$run_id") EMBED_COMMIT=$(quoted "$commit")
srun --kill-on-bad-exit=0 --wait=180 --cpus-per-task=$cpus $(quoted "${EMBED:-$root/.venv/bin/embed}" "${arguments[0]}" --distributed "${arguments[@]:1}")
code=\$?
echo "embed ended with code \$code"
# Codes: docs/runs.md. srun returns the highest code, signals first. 137: a process was killed, as when out of memory.
case \$code in 75 | 134 | 137 | 143) ((\${SLURM_RESTART_COUNT:-0} < 100)) && scontrol requeue "\$SLURM_JOB_ID" ;; esac
exit \$code
SCRIPT
}

case "$verb" in
  submit)
    need nodes gpus
    need_name
    need_verb
    logs=$(log_folder)
    [[ -n "$logs" ]] || die "no folder for logs: set LOGS or --workdir to a folder that all nodes share"
    run_id=${run_id:-$name-$(date +%Y%m%d-%H%M%S)-$commit}
    run mkdir -p "$logs"
    if $dry_run; then
      quoted sbatch --parsable "--output=$logs/slurm-%j.log"
      batch_script
    else
      batch_script | sbatch --parsable "--output=$logs/slurm-%j.log"
    fi
    echo "run $run_id, commit $commit" >&2 ;;
  list)
    run squeue --me --format='%i %j %T %M %D %R' ;;
  logs)
    need job
    logs=${LOGS:-$workdir.logs}
    [[ "$logs" != .logs ]] || need workdir
    run tail -n 100 "$logs/slurm-$job.log" ;;
  stop)
    need job
    # The signal reaches only the processes. Requeue=0 keeps the batch script from requeueing the job afterwards.
    run scontrol update "JobId=$job" Requeue=0
    run scancel --state=PENDING "$job" # a pending job has no processes that a signal could end
    run scancel --signal=TERM --state=RUNNING "$job" ;;
esac

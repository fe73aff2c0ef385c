#!/usr/bin/env bash
# Run a verb of embed on Cloud TPU slices, as a queued resource.
#
#   launch/tpu.sh submit --name=NAME --zone=ZONE --type=TYPE --runtime=VERSION [--slices=N] [--spot] [--project=PROJECT]
#                        [--run-id=ID] -- VERB ARGUMENTS...      with --workdir=gs://BUCKET/… or --output=gs://BUCKET/…
#   launch/tpu.sh list --zone=ZONE
#   launch/tpu.sh logs --name=NAME --zone=ZONE [--slices=N]       the end of the log of every host
#   launch/tpu.sh stop --name=NAME --zone=ZONE [--slices=N]       training saves, then the slices are deleted
#   --dry-run with any of them                       print the commands, run nothing
#
#   launch/tpu.sh submit --name=pair --zone=us-east5-b --type=v6e-64 --runtime=v2-alpha-tpuv6e --spot \
#       -- train --config=configs/pplx_embed.py:stage=pair --workdir=gs://my-bucket/runs/pplx_embed
#
# The committed code is copied as an archive to gs://BUCKET/source/RUN.tar.gz, in the bucket that the verb writes to.
# Each host fetches it and runs `embed VERB --distributed` as a service. The service restarts after failures that a
# restart can mend, at most 20 times per hour, and when the host reboots. A preempted spot slice does not come back:
# stop, submit under the same name again, and the run continues. Slices cost until stop, also those of a finished run.
source "$(dirname "$0")/common.sh"

name='' zone='' type='' runtime='' slices=1 spot='' project='' run_id=''
options "name zone type runtime slices spot! project run_id" "$@"
need_command
need_number slices
location=(${zone:+"--zone=$zone"} ${project:+"--project=$project"})

# The startup script of a host. The exit codes of embed: docs/runs.md.
startup_script() {
  cat <<SCRIPT
#!/usr/bin/env bash
set -euxo pipefail
exec >>/var/log/embed.log 2>&1
export PATH=\$PATH:/snap/bin # where gcloud is on some images
mkdir -p /opt/embed
cd /opt/embed
gcloud storage cp $(quoted "gs://$bucket/source/$run_id.tar.gz") source.tar.gz
tar -xzf source.tar.gz
if [[ ! -x .venv/bin/embed ]]; then # the Python of the hosts is too old for embed
  python3 -m pip --version || { apt-get update && apt-get install -y python3-pip; }
  python3 -m pip install --quiet uv
  python3 -m uv venv --clear --python 3.12 .venv # --clear: an earlier boot may have been interrupted here
  python3 -m uv pip install --quiet --python .venv/bin/python --editable '.[tpu,gcs]'
fi
cat >/opt/embed.sh <<'RUN'
#!/usr/bin/env bash
cd /opt/embed
export EMBED_RUN_ID=$(quoted "$run_id") EMBED_COMMIT=$(quoted "$commit")
exec $(quoted .venv/bin/embed "${arguments[0]}" --distributed "${arguments[@]:1}")
RUN
chmod +x /opt/embed.sh
# A service, because a process of a startup script gets no SIGTERM when the host is preempted. It restarts after 143
# too: when one host is preempted, all processes save and end, and those of the other hosts must wait for its return.
cat >/etc/systemd/system/embed.service <<'UNIT'
[Unit]
Description=embed
Wants=network-online.target
After=network-online.target
StartLimitIntervalSec=1h
StartLimitBurst=20

[Service]
ExecStart=/opt/embed.sh
StandardOutput=append:/var/log/embed.log
StandardError=append:/var/log/embed.log
Restart=on-failure
RestartSec=10
RestartPreventExitStatus=1 2 130
KillMode=mixed
TimeoutStopSec=600
UNIT
systemctl daemon-reload
systemctl start embed
SCRIPT
}

case "$verb" in
  submit)
    need name zone type runtime
    need_name
    need_verb
    need_bucket
    if [[ "$commit" == *-dirty ]] && ! $dry_run; then die "uncommitted changes would not be copied: commit them"; fi
    run_id=${run_id:-$name-$(date +%Y%m%d-%H%M%S)-$commit}
    if $dry_run; then
      archive="$run_id.tar.gz" script="startup.sh"
      echo "# startup.sh"
      startup_script
      echo "# commands"
    else
      folder=$(mktemp -d)
      trap 'rm -r "$folder"' EXIT
      archive="$folder/$run_id.tar.gz" script="$folder/startup.sh"
      startup_script >"$script"
    fi
    run git -C "$root" archive --format=tar.gz --output="$archive" HEAD
    run gcloud storage cp "$archive" "gs://$bucket/source/$run_id.tar.gz" ${project:+"--project=$project"}
    nodes=(--node-id="$name")
    if ((slices > 1)); then nodes=(--node-count="$slices" --node-prefix="$name"); fi
    run gcloud compute tpus queued-resources create "$name" "${nodes[@]}" "${location[@]}" --accelerator-type="$type" \
      --runtime-version="$runtime" ${spot:+--spot} --labels="app=embed" \
      --scopes=https://www.googleapis.com/auth/cloud-platform --metadata-from-file="startup-script=$script"
    echo "run $run_id, commit $commit" >&2 ;;
  list)
    need zone
    run gcloud compute tpus queued-resources list "${location[@]}" ;;
  logs | stop)
    need name zone
    # A queued resource of several slices has nodes NAME-0, NAME-1, …
    nodes=("$name")
    if ((slices > 1)); then nodes=(); for ((k = 0; k < slices; k++)); do nodes+=("$name-$k"); done; fi
    remote='tail -n 100 /var/log/embed.log'
    if [[ "$verb" == stop ]]; then
      # Waits until the process has saved and ended. All hosts save the same step.
      remote='sudo systemctl stop embed'
    fi
    for node in "${nodes[@]}"; do
      run gcloud compute tpus tpu-vm ssh "$node" "${location[@]}" --worker=all --command="$remote" ||
        echo "${0##*/}: no answer from $node" >&2
    done
    if [[ "$verb" == stop ]]; then
      run gcloud compute tpus queued-resources delete "$name" "${location[@]}" --force --quiet
    fi ;;
esac

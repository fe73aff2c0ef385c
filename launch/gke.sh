#!/usr/bin/env bash
# Run a verb of embed on TPU slices of a GKE cluster, as a JobSet: one job per slice, one pod per host.
#
#   launch/gke.sh submit --name=NAME --accelerator=LABEL --topology=AxB --image=IMAGE [--slices=N]
#                        [--chips-per-host=N: by default 4, or all of a smaller slice] [--service-account=NAME]
#                        [--restarts=100] [--run-id=ID]
#                        -- VERB ARGUMENTS...        with --workdir=gs://BUCKET/… or --output=gs://BUCKET/…
#   launch/gke.sh list
#   launch/gke.sh logs --name=NAME
#   launch/gke.sh stop --name=NAME                   training saves, then the pods end
#   --dry-run with any of them                       print the commands and the manifest, run nothing
#
#   launch/gke.sh submit --name=pair --accelerator=tpu-v6e-slice --topology=8x8 --image=REGISTRY/embed:abc1234 \
#       -- train --config=configs/pplx_embed.py:stage=pair --workdir=gs://my-bucket/runs/pplx_embed
#
# Needs kubectl with the cluster as its context, JobSet (0.7 or later) in the cluster, an image built from
# launch/Dockerfile, and a service account that may write to the bucket. If a pod is lost or fails, the set restarts and
# the run continues. Wrong input (exit codes 1 and 2) fails the set at once.
source "$(dirname "$0")/common.sh"

name='' accelerator='' topology='' image='' slices=1 chips_per_host='' service_account='' restarts=100 run_id=''
options "name accelerator topology image slices chips_per_host service_account restarts run_id" "$@"
need_command
need_number slices chips_per_host restarts

# Text as a YAML scalar.
scalar() { printf "'%s'" "${1//\'/\'\'}"; }

# Check `topology` and `chips_per_host`. Sets `chips`, those of a slice, and the default of `chips_per_host`.
need_topology() {
  local size sizes=
  [[ "$topology" =~ ^[1-9][0-9]{0,3}(x[1-9][0-9]{0,3}){1,2}$ ]] || die "--topology=$topology must be AxB or AxBxC"
  chips=$((${topology//x/*}))
  for size in 1 2 4 8; do ((chips % size)) || sizes+=" $size"; done
  chips_per_host=${chips_per_host:-$((chips % 4 ? chips : 4))}
  [[ "$sizes " == *" $chips_per_host "* ]] ||
    die "--chips-per-host=$chips_per_host must divide the $chips chips of $topology: one of$sizes"
}

manifest() {
  local hosts=$((chips / chips_per_host)) word
  cat <<YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $(scalar "$name")
  labels: {app: embed}
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
    embed/run-id: $(scalar "$run_id")
spec:
  failurePolicy:
    maxRestarts: $restarts
    restartStrategy: BlockingRecreate
    rules:
    - name: wrong_input
      action: FailJobSet
      onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
  - name: slice
    replicas: $slices
    template:
      spec:
        parallelism: $hosts
        completions: $hosts
        backoffLimit: 0
        podFailurePolicy:
          rules:
          - action: FailJob
            onExitCodes: {containerName: embed, operator: In, values: [1, 2]}
        template:
          metadata:
            labels: {app: embed}
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: 600
YAML
  if [[ -n "$service_account" ]]; then echo "            serviceAccountName: $(scalar "$service_account")"; fi
  cat <<YAML
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: $(scalar "$accelerator")
              cloud.google.com/gke-tpu-topology: $(scalar "$topology")
            containers:
            - name: embed
              image: $(scalar "$image")
              command:
YAML
  for word in embed "${arguments[0]}" --distributed "${arguments[@]:1}"; do echo "              - $(scalar "$word")"; done
  cat <<YAML
              env:
              - {name: EMBED_RUN_ID, value: $(scalar "$run_id")}
              ports:
              - {containerPort: 8471}
              - {containerPort: 8080}
              resources:
                limits: {google.com/tpu: $chips_per_host}
YAML
}

case "$verb" in
  submit)
    need name accelerator topology image
    need_name
    need_verb
    need_bucket
    need_topology
    # The code is the image's, not this clone's, so the run is named after the image; EMBED_COMMIT is set in the image.
    version=${image##*[:/@]}
    run_id=${run_id:-$name-$(date +%Y%m%d-%H%M%S)-${version:0:12}}
    if $dry_run; then
      manifest
      echo "# kubectl apply -f - with the manifest above"
    else
      manifest | kubectl apply -f -
    fi
    echo "run $run_id, image $image" >&2 ;;
  list)
    run kubectl get jobsets -l app=embed ;;
  logs)
    need name
    run kubectl logs -l "jobset.sigs.k8s.io/jobset-name=$name" -c embed --prefix --tail=100 --max-log-requests=1000 ;;
  stop)
    need name
    run kubectl delete jobset "$name" --cascade=foreground ;; # waits for the pods
esac

#!/usr/bin/env bash
# What the launchers of this folder share; they source it.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck disable=SC2034 # the launchers use it
commit=$(git -C "$root" describe --always --dirty 2>/dev/null || echo unknown)
dry_run=false

# The comment at the head of the launcher.
usage() {
  awk 'NR == 1 { next } /^#/ { sub(/^# ?/, ""); print; next } { exit }' "$0"
}

die() {
  echo "${0##*/}: $*" >&2
  echo "launch/${0##*/} --help says more" >&2
  exit 2
}

# A command as it could be typed.
quoted() {
  local word out=
  for word in "$@"; do
    if [[ "$word" =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then out+=" $word"; else out+=" $(printf %q "$word")"; fi
  done
  echo "${out# }"
}

# Runs a command, or prints it in a dry run.
run() {
  if $dry_run; then quoted "$@"; else "$@"; fi
}

# --name=value options before `--` as variables of that name, the one word between them as `words`, and what follows
# `--` as the array `arguments`. options "name zone …" "$@"; a name with ! after it is a switch.
options() {
  local known=" $1 dry_run! " option
  shift
  words=() arguments=()
  while (($#)); do
    option=${1%%=*}; option=${option#--}; option=${option//-/_}
    case "$1" in
      --) shift; arguments=("$@"); return ;;
      -h | --help) usage; exit 0 ;;
      --*=*)
        [[ "$known" != *" $option! "* ]] || die "${1%%=*} takes no value"
        [[ "$known" == *" $option "* ]] || die "unknown option ${1%%=*}; there are:$(option_names "$known")"
        printf -v "$option" %s "${1#*=}" ;;
      --*)
        [[ "$known" == *" $option! "* ]] || die "$1 is unknown or needs =VALUE; there are:$(option_names "$known")"
        printf -v "$option" true ;;
      -*) die "unknown option $1; there are:$(option_names "$known")" ;;
      *)
        ((!${#words[@]})) || die "unexpected argument $1; the verb of embed and its arguments stand after --"
        words+=("$1") ;;
    esac
    shift
  done
}

option_names() {
  local name
  for name in $1; do name=${name%!}; printf ' --%s' "${name//_/-}"; done
}

# The one word of submit, list, logs and stop, as `verb`.
need_command() {
  verb=${words[0]:-}
  case "$verb" in submit | list | logs | stop) ;; *) usage >&2; exit 2 ;; esac
  [[ "$verb" == submit ]] || ((!${#arguments[@]})) || die "$verb takes nothing after --"
}

# need_number nodes gpus …: these options must be whole numbers where they are given.
need_number() {
  local option
  for option in "$@"; do
    [[ "${!option:-1}" =~ ^[1-9][0-9]{0,8}$ ]] || die "--${option//_/-}=${!option} must be a whole number of at least 1"
  done
}

# need name zone …: these options must have been given.
need() {
  local option
  for option in "$@"; do [[ -n "${!option:-}" ]] || die "--${option//_/-}=VALUE is missing"; done
}

# `arguments` must be a verb of `embed` that several processes can run, one that joins them, with what it cannot do without.
need_verb() {
  local verb=${arguments[0]:-} known wanted
  known=" $(cd "$root/embed/cli" && grep -l 'common\.join(' -- *.py | sed 's/\.py$//' | tr '\n' ' ')"
  [[ -n "$verb" && "$known" == *" $verb "* ]] || die "after -- stands a verb of embed, not '$verb': one of${known% }"
  if [[ "$verb" == train || "$verb" == pipeline ]]; then
    for wanted in --config --workdir; do
      [[ " ${arguments[*]} " == *" $wanted"[=\ ]* ]] || die "embed $verb needs $wanted=…"
    done
  fi
}

# What is written must lie in a bucket, whose name becomes `bucket`. A folder would be each host's own.
need_bucket() {
  local argument name
  bucket=
  for argument in "${arguments[@]}"; do
    name=${argument%%=*}
    case "$argument" in
      --workdir=gs://?*/?* | --output=gs://?*/?*) argument=${argument#*=gs://}; bucket=${bucket:-${argument%%/*}} ;;
      --workdir | --workdir=* | --output | --output=*) die "$argument must be $name=gs://BUCKET/NAME: a folder would be each host's own" ;;
    esac
  done
  [[ -n "$bucket" ]] || die "the arguments of embed ${arguments[0]} need --workdir=gs://BUCKET/NAME or --output=gs://BUCKET/NAME"
}

# The folder for logs: LOGS, or WORKDIR.logs where `arguments` name a workdir on a disk, otherwise empty.
log_folder() {
  local k workdir=
  for k in "${!arguments[@]}"; do
    case "${arguments[k]}" in
      --workdir=*) workdir=${arguments[k]#--workdir=} ;;
      --workdir) workdir=${arguments[k + 1]:-} ;;
    esac
  done
  workdir=${workdir/#"~/"/"$HOME/"} # as embed does: a shell leaves the ~ of --workdir=~/runs as it is
  if [[ -n "${LOGS:-}" ]]; then echo "$LOGS"; elif [[ -n "$workdir" && "$workdir" != *://* ]]; then echo "$workdir.logs"; fi
}

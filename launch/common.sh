#!/usr/bin/env bash
# Code that the launchers of this folder share; they source it.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck disable=SC2034 # the launchers use it
commit=$(git -C "$root" describe --always --dirty 2>/dev/null || echo unknown)
dry_run=false

# Print the comment at the top of the launcher.
usage() {
  awk 'NR == 1 { next } /^#/ { sub(/^# ?/, ""); print; next } { exit }' "$0"
}

die() {
  echo "${0##*/}: $*" >&2
  echo "see launch/${0##*/} --help" >&2
  exit 2
}

# Print a command as it can be typed.
quoted() {
  local word out=
  for word in "$@"; do
    if [[ "$word" =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then out+=" $word"; else out+=" $(printf %q "$word")"; fi
  done
  echo "${out# }"
}

# Run a command, or print it in a dry run.
run() {
  if $dry_run; then quoted "$@"; else "$@"; fi
}

# options "name zone …" "$@": set variables from the --name=value options before `--`, `words` from the single word
# among them, and the array `arguments` from everything after `--`. A name that ends in ! is a switch. An option of the
# launcher after `--` is refused, unless the verb of embed has an option of that name.
options() {
  local known=" $1 dry_run! " option
  shift
  words=() arguments=()
  while (($#)); do
    option=${1%%=*}; option=${option#--}; option=${option//-/_}
    case "$1" in
      --)
        shift; arguments=("$@")
        for option in "$@"; do
          [[ "$option" == --* ]] || continue
          option=${option%%=*}; option=${option#--}; option=${option//-/_}
          [[ "$known" == *" $option "* || "$known" == *" $option! "* ]] || continue
          grep -qs "\"--$option\"" "$root/embed/cli/common.py" "$root/embed/cli/$1.py" ||
            die "--${option//_/-} comes after --, but the options of the launcher come before --"
        done
        return ;;
      -h | --help) usage; exit 0 ;;
      --*=*)
        [[ "$known" != *" $option! "* ]] || die "${1%%=*} takes no value"
        [[ "$known" == *" $option "* ]] || die "unknown option ${1%%=*}, expected one of:$(option_names "$known")"
        printf -v "$option" %s "${1#*=}" ;;
      --*)
        [[ "$known" == *" $option! "* ]] || die "$1 is unknown or needs =VALUE; options:$(option_names "$known")"
        printf -v "$option" true ;;
      -*) die "unknown option $1, expected one of:$(option_names "$known")" ;;
      *)
        ((!${#words[@]})) || die "unexpected argument $1: the verb of embed and its arguments come after --"
        words+=("$1") ;;
    esac
    shift
  done
}

option_names() {
  local name
  for name in $1; do name=${name%!}; printf ' --%s' "${name//_/-}"; done
}

# Set `verb` to the single word: submit, list, logs or stop.
need_command() {
  verb=${words[0]:-}
  case "$verb" in submit | list | logs | stop) ;; *) usage >&2; exit 2 ;; esac
  [[ "$verb" == submit ]] || ((!${#arguments[@]})) || die "$verb takes no arguments after --"
}

# need_number nodes gpus …: these options, if given, must be whole numbers.
need_number() {
  local option
  for option in "$@"; do
    [[ "${!option:-1}" =~ ^[1-9][0-9]{0,8}$ ]] || die "--${option//_/-}=${!option} must be a whole number, at least 1"
  done
}

# The name of a job: Kubernetes and Cloud TPU append to it and allow 63 characters.
need_name() {
  [[ "$name" =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] || die "--name=$name must be at most 40 lower-case letters," \
    "digits and hyphens, begin with a letter and not end with a hyphen"
}

# need name zone …: these options are required.
need() {
  local option
  for option in "$@"; do [[ -n "${!option:-}" ]] || die "--${option//_/-}=VALUE is missing"; done
}

# `arguments` must be a verb of `embed` that several processes can run, with its required arguments.
need_verb() {
  local verb=${arguments[0]:-} known required
  known=" $(cd "$root/embed/cli" && grep -l 'common\.join(' -- *.py | sed 's/\.py$//' | tr '\n' ' ')"
  [[ -n "$verb" && "$known" == *" $verb "* ]] || die "expected a verb of embed after --, not '$verb': one of${known% }"
  if [[ "$verb" == train || "$verb" == pipeline ]]; then
    for required in --config --workdir; do
      [[ " ${arguments[*]} " == *" $required"[=\ ]* ]] || die "embed $verb needs $required=…"
    done
  fi
}

# The output must be in a bucket, because each host would have its own folder. Sets `bucket` to its name.
need_bucket() {
  local argument name
  bucket=
  for argument in "${arguments[@]}"; do
    name=${argument%%=*}
    case "$argument" in
      --workdir=gs://?*/?* | --output=gs://?*/?*) argument=${argument#*=gs://}; bucket=${bucket:-${argument%%/*}} ;;
      --workdir | --workdir=* | --output | --output=*)
        die "$argument must be $name=gs://BUCKET/NAME: each host would have its own folder" ;;
    esac
  done
  [[ -n "$bucket" ]] || die "embed ${arguments[0]} needs --workdir=gs://BUCKET/NAME or --output=gs://BUCKET/NAME"
}

# Print the folder for logs: LOGS, or WORKDIR.logs if `arguments` has a workdir on a disk, otherwise nothing.
log_folder() {
  local k workdir=
  for k in "${!arguments[@]}"; do
    case "${arguments[k]}" in
      --workdir=*) workdir=${arguments[k]#--workdir=} ;;
      --workdir) workdir=${arguments[k + 1]:-} ;;
    esac
  done
  workdir=${workdir/#"~/"/"$HOME/"} # as embed does: a shell does not expand the ~ of --workdir=~/runs
  if [[ -n "${LOGS:-}" ]]; then
    echo "$LOGS"
  elif [[ -n "$workdir" && "$workdir" != *://* ]]; then
    echo "$workdir.logs"
  fi
}

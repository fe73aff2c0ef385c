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
  echo "${0##*/} --help says more" >&2
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

# --name=value options in front of `--` as variables of that name; what follows `--` as the array `arguments`.
# options "name zone …" "$@"; a name with ! behind it is a switch.
options() {
  local known=" $1 " option
  shift
  arguments=()
  while (($#)); do
    option=${1%%=*}; option=${option#--}; option=${option//-/_}
    case "$1" in
      --) shift; arguments=("$@"); return ;;
      --dry-run) dry_run=true ;;
      --*=*)
        [[ "$known" == *" $option "* ]] || die "unknown option ${1%%=*}; there are:${known//_/-}"
        printf -v "$option" %s "${1#*=}" ;;
      --*)
        [[ "$known" == *" $option! "* ]] || die "$1 is unknown or needs =VALUE; there are:${known//_/-}"
        printf -v "$option" true ;;
      *) die "unexpected argument $1" ;;
    esac
    shift
  done
}

# need name zone …: these options must have been given.
need() {
  local option
  for option in "$@"; do [[ -n "${!option:-}" ]] || die "--${option//_/-}=VALUE is missing"; done
}

# `arguments` must be those of a stage's `embed train`.
need_arguments() {
  local wanted
  for wanted in --config= --workdir=; do
    [[ " ${arguments[*]} " == *" $wanted"* ]] || die "the arguments of embed train behind -- need $wanted…"
  done
}

# need_below FOLDER: the workdir must lie in the mounted bucket. Any other folder would be each host's own.
need_below() {
  local argument
  for argument in "${arguments[@]}"; do
    if [[ "$argument" == --workdir=* && "$argument" != "--workdir=$1/"?* ]]; then
      die "$argument must be a folder below $1, where the bucket is mounted"
    fi
  done
}

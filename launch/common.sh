#!/usr/bin/env bash
# Shared by the scripts in this folder: strict mode, flags, quoting and --print. Sourced, never run.
#
# A script declares its flags, then parses its arguments:
#
#   flag NAME [DEFAULT]   sets $opt_NAME (dashes become underscores) from --NAME VALUE; required without DEFAULT
#   switch NAME           sets $opt_NAME to 1 if --NAME is given, else to the empty string
#   parse "$@"            --help prints the script's header comment; --print sets $print; $command is what follows --
#
# and calls programs through `run`, which under --print prints them instead.

set -euo pipefail
if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
  echo "${0##*/}: needs bash 4.4 or newer, not $BASH_VERSION (on macOS: brew install bash)" >&2
  exit 2
fi

launch_dir=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck disable=SC2034  # used by the scripts that source this file
repository=$(dirname "$launch_dir")
print=
command=()
declare -A flag_kinds=([print]=switch)
flag_names=(--print)

die() {
  printf '%s: %s\n' "${0##*/}" "$*" >&2
  exit 2
}

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }

# The running script's header comment is its manual.
manual() { sed -n -e '1d' -e '/^#/!q' -e 's/^# \{0,1\}//p' "$0"; }

flag() {
  flag_kinds[$1]=$([[ $# -gt 1 ]] && echo optional || echo required)
  flag_names+=("--$1")
  printf -v "opt_${1//-/_}" '%s' "${2-}"
}

switch() {
  flag_kinds[$1]=switch
  flag_names+=("--$1")
  printf -v "opt_${1//-/_}" ''
}

parse() {
  local argument name value
  local -A given=()
  while (($#)); do
    argument=$1
    shift
    case $argument in
      -h | --help)
        manual
        exit 0
        ;;
      --)
        command=("$@")
        break
        ;;
      --?*) ;;
      *) die "unexpected argument '$argument'; the command to run goes after --, and --help explains the flags" ;;
    esac
    name=${argument#--}
    name=${name%%=*}
    case ${flag_kinds[$name]-} in
      '') die "no flag --$name; there are ${flag_names[*]}" ;;
      switch)
        [[ $argument != *=* ]] || die "--$name takes no value"
        value=1
        ;;
      *)
        if [[ $argument == *=* ]]; then
          value=${argument#*=}
        else
          (($#)) || die "--$name needs a value"
          value=$1
          shift
        fi
        [[ -n $value ]] || die "--$name needs a nonempty value"
        [[ $value != *$'\n'* ]] || die "--$name: the value must be a single line"
        ;;
    esac
    given[$name]=1
    if [[ $name == print ]]; then print=1; else printf -v "opt_${name//-/_}" '%s' "$value"; fi
  done
  for name in "${flag_names[@]#--}"; do
    [[ ${flag_kinds[$name]} != required || -n ${given[$name]-} ]] || die "--$name is needed; --help shows an example"
  done
}

need_command() {
  ((${#command[@]})) || die "no command to run: end with  -- stepjax pretrain RECIPE ..."
  local word
  for word in "${command[@]}"; do
    [[ $word != *$'\n'* ]] || die "the command must be a single line; '${word%%$'\n'*}' is followed by a line break"
  done
}

# need_number FLAG SMALLEST: the flag's value is a whole number, at least SMALLEST.
need_number() {
  local variable=opt_${1//-/_}
  [[ ${!variable} =~ ^(0|[1-9][0-9]{0,8})$ ]] || die "--$1 must be a whole number, not '${!variable}'"
  ((${!variable} >= $2)) || die "--$1 must be at least $2, not ${!variable}"
}

# need_name FLAG: the flag's value can name a cloud resource, a job and a file.
need_name() {
  local variable=opt_${1//-/_}
  [[ ${!variable} =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
    die "--$1 '${!variable}': use up to 40 lower-case letters, digits and dashes, a letter first and no dash last"
}

# need_bucket FLAG: the flag's value, if any, is a path that every host can reach.
need_bucket() {
  local variable=opt_${1//-/_}
  [[ ${!variable:-gs://} == gs://* ]] || die "--$1 must be a gs:// path, which every host reaches, not '${!variable}'"
}

# Quotes the arguments as one line that any POSIX shell parses into the same words.
quoted() {
  local word out=()
  for word in "$@"; do
    if [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]]; then out+=("$word"); else out+=("'${word//\'/\'\\\'\'}'"); fi
  done
  printf '%s' "${out[*]}"
}

# Runs a command, or prints it under --print.
run() {
  if [[ $print ]]; then
    quoted "$@"
    echo
  else
    "$@"
  fi
}

# Prints a shell comment between the printed commands.
remark() { if [[ $print ]]; then printf '# %s\n' "$*"; fi; }

need_program() {
  [[ $print ]] || type -P "$1" >/dev/null || die "$1 is not installed, or not on the PATH ($2)"
}

# flags_of_chip CHIP: shell code that sets the compiler's flags for the chip, before the user's own flags, which win.
flags_of_chip() {
  local variable=LIBTPU_INIT_ARGS
  case $1 in v[0-9]* | tpu[0-9]*) ;; *) variable=XLA_FLAGS ;; esac
  # shellcheck disable=SC2016  # expanded where it runs
  printf 'flags=$(python -m stepjax.xla_flags %s) && export %s="$flags ${%s-}"' "$1" "$variable" "$variable"
}

# read_tpu_type TYPE: sets tpu_chip, tpu_gke, tpu_topology, tpu_chips, tpu_chips_per_host, tpu_vm_hosts and tpu_image
# from tpu_types.tsv, which explains them.
read_tpu_type() {
  local type chip gke topology chips chips_per_host vm_hosts image known=()
  while IFS=$'\t' read -r type chip gke topology chips chips_per_host vm_hosts image; do
    [[ $type != '#'* ]] || continue
    known+=("$type")
    [[ $type == "$1" ]] || continue
    # shellcheck disable=SC2034  # for the scripts that source this file
    tpu_chip=$chip tpu_gke=$gke tpu_topology=$topology tpu_chips=$chips \
      tpu_chips_per_host=$chips_per_host tpu_vm_hosts=$vm_hosts tpu_image=$image
    return
  done <"$launch_dir/tpu_types.tsv"
  die "no TPU is called '$1' in launch/tpu_types.tsv; there are ${known[*]}"
}

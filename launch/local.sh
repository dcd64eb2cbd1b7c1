#!/usr/bin/env bash
# One or several processes on this machine: a workstation, a server with GPUs, or CPUs to try a multi-process run on.
#
#   launch/local.sh -- stepjax pretrain configs/digits/pretrain.py
#   launch/local.sh --processes 4 --restarts 3 -- stepjax pretrain configs/digits/pretrain.py --out runs/four
#   launch/local.sh --processes 8 --gpu-each --chip h100 --cache-dir ~/.cache/stepjax -- stepjax pretrain RECIPE
#
# Needs: bash 4.4 and what the command needs. Several processes find each other over localhost at a port that is free
# when they start (JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID). Their output goes to the console,
# each line behind the process's number, and to LOG_DIR/process-N.log, which a later run appends to.
#
# SIGTERM and SIGINT (Ctrl-C) are passed on to every process, which saves a checkpoint and leaves; a second signal is
# passed on too, and ends stepjax at once. When a process fails, the others get SIGTERM a second later. The exit
# status is that of the worst process: one that a restart does not mend, else 75 (a peer died), else 130 or 143
# (stopped by a signal), else 0. With --restarts, all processes start again, with another port, after 75, and after
# 143 unless the SIGTERM came here.
#
# Flags:
#   --processes N       how many (1)
#   --restarts N        how often to start again, at most (0)
#   --grace SECONDS     time to save after a signal, before SIGKILL (120)
#   --peer-grace SECONDS  time to leave after another process failed, before SIGKILL (20)
#   --delay SECONDS     pause before a restart (5)
#   --log-dir DIR       where the logs go (runs/logs)
#   --cache-dir DIR     JAX's compilation cache, kept between runs (JAX_COMPILATION_CACHE_DIR)
#   --chip CHIP         set the compiler's flags for it: v5e, v5p, v6e, tpu7x or h100
#   --gpu-each          process N uses this machine's GPU N only (JAX_LOCAL_DEVICE_IDS)
#   --print             print what would run, and run nothing
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

flag processes 1
flag restarts 0
flag grace 120
flag peer-grace 20
flag delay 5
flag log-dir runs/logs
flag cache-dir ''
flag chip ''
switch gpu-each
parse "$@"
need_command
need_number processes 1
need_number restarts 0
need_number grace 1
need_number peer-grace 1
need_number delay 0

free_port() {
  local port
  while :; do
    port=$((20000 + (RANDOM * 32768 + RANDOM) % 40000))
    if ! (: <>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
      echo "$port"
      return
    fi
  done
}

# environment_of N PORT: the variables that process N gets, in `environment`.
environment_of() {
  environment=()
  if ((opt_processes > 1)); then
    environment+=("JAX_COORDINATOR_ADDRESS=127.0.0.1:$2" "JAX_NUM_PROCESSES=$opt_processes" "JAX_PROCESS_ID=$1")
  fi
  [[ -z $opt_gpu_each ]] || environment+=("JAX_LOCAL_DEVICE_IDS=$1")
  [[ -z $opt_cache_dir ]] || environment+=("JAX_COMPILATION_CACHE_DIR=$opt_cache_dir")
}

if [[ $print ]]; then
  remark "On this machine, all $opt_processes at once; the port is another at every start:"
  run mkdir -p "$opt_log_dir"
  [[ -z $opt_chip ]] || printf '%s\n' "$(flags_of_chip "$opt_chip")"
  port=$(free_port)
  for ((n = 0; n < opt_processes; n++)); do
    environment_of "$n" "$port"
    if ((${#environment[@]})); then words=(env "${environment[@]}" "${command[@]}"); else words=("${command[@]}"); fi
    printf '%s 2>&1 | tee -a %s &\n' "$(quoted "${words[@]}")" "$(quoted "$opt_log_dir/process-$n.log")"
  done
  echo wait
  exit 0
fi

type -P "${command[0]}" >/dev/null || die "there is no program '${command[0]}' to run"
mkdir -p "$opt_log_dir"
if [[ $opt_chip ]]; then
  assignment=$(flags_of_chip "$opt_chip")
  eval "$assignment" || die "the compiler's flags for the chip '$opt_chip' could not be found"
fi

pipes=$(mktemp -d)
mkfifo "$pipes/clock"
exec 9<>"$pipes/clock"
pids=() readers=() statuses=()
received= # the first signal that came to this script

kill_groups() {
  local pid
  for pid in "${pids[@]}"; do kill -KILL -- "-$pid" 2>/dev/null || true; done
}

# Whatever ends this script ends the processes.
leave() {
  kill_groups
  rm -rf "$pipes"
}
trap leave EXIT

# signal_running NAME: to the processes themselves, and not to what they have started, which is theirs to end.
signal_running() {
  local n
  for n in "${!pids[@]}"; do
    [[ -n ${statuses[n]-} ]] || kill "-$1" "${pids[n]}" 2>/dev/null || true
  done
}

pass_on() {
  received=${received:-$1}
  say "SIG$1: passed on; waiting for the processes to save and leave"
  signal_running "$1"
}
trap 'pass_on TERM' TERM
trap 'pass_on INT' INT

# copy_lines N: standard input to the console, behind the process's number, and to its log.
copy_lines() {
  trap '' TERM INT
  local line
  while IFS= read -r line || [[ $line ]]; do
    printf '%s\n' "$line" >>"$opt_log_dir/process-$1.log"
    printf '[%s] %s\n' "$1" "$line"
  done
}

# Each process gets a process group of its own (set -m), or a terminal's Ctrl-C would reach it beside what is passed on.
start() {
  local n port environment
  pids=() readers=() statuses=()
  port=$(free_port)
  set -m
  for ((n = 0; n < opt_processes; n++)); do
    environment_of "$n" "$port"
    [[ -p $pipes/$n ]] || mkfifo "$pipes/$n"
    copy_lines "$n" <"$pipes/$n" 9>&- &
    readers[n]=$!
    env "${environment[@]}" "${command[@]}" >"$pipes/$n" 2>&1 9>&- &
    pids[n]=$!
  done
  set +m
}

# Waits until all have left; `worst` is then the status that the run has.
supervise() {
  local n status running deadline='' stopping='' killed='' looks=0
  worst=0
  while :; do
    running=0
    for n in "${!pids[@]}"; do
      [[ -z ${statuses[n]-} ]] || continue
      if kill -0 "${pids[n]}" 2>/dev/null; then
        running=$((running + 1))
        continue
      fi
      status=0
      wait "${pids[n]}" 2>/dev/null || status=$?
      statuses[n]=$status
      ((status == 0)) || say "process $n left with status $status"
      # What our own signals did to the others of a failed process is no cause.
      if [[ $stopping ]] && ((status == 143 || status == 137)); then continue; fi
      if (($(severity "$status") > $(severity "$worst"))); then worst=$status; fi
      if [[ -z $stopping && -z $received ]] && ((status != 0)); then
        stopping=1
        deadline=$((SECONDS + opt_peer_grace + 1)) # SECONDS is rounded down
      fi
    done
    ((running)) || break
    # Those that are leaving by themselves have a second to do so, with a status of their own.
    if [[ $stopping ]] && ((++looks == 10)); then
      say "stopping the other $running within $opt_peer_grace s"
      signal_running TERM
    fi
    [[ -z $received || -n $deadline ]] || deadline=$((SECONDS + opt_grace + 1))
    if [[ $deadline && -z $killed ]] && ((SECONDS >= deadline)); then
      killed=1
      say "time is up: SIGKILL"
      kill_groups
    fi
    read -r -t 0.1 -u 9 || true # a pause that costs no process, and that a signal's trap follows
  done
  kill_groups # what the processes may have left behind, which would keep their pipes open
  wait "${readers[@]}" 2>/dev/null || true
}

severity() {
  case $1 in 0) echo 0 ;; 143) echo 1 ;; 130) echo 2 ;; 75) echo 3 ;; *) echo 4 ;; esac
}

for ((attempt = 0; ; attempt++)); do
  start
  supervise
  if [[ $received ]] || ((worst != 75 && worst != 143 || attempt >= opt_restarts)); then exit "$worst"; fi
  say "status $worst: restart $((attempt + 1)) of $opt_restarts in $opt_delay s"
  until=$((SECONDS + opt_delay))
  while ((SECONDS < until)) && [[ -z $received ]]; do read -r -t 0.1 -u 9 || true; done
  [[ -z $received ]] || exit "$worst"
done

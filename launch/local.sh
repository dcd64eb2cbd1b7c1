#!/usr/bin/env bash
# Run one or more processes on this machine: a workstation, a GPU server, or CPUs to try a multi-process run.
#
#   launch/local.sh -- stepjax pretrain configs/digits/pretrain.py
#   launch/local.sh --processes 4 --restarts 3 -- stepjax pretrain configs/digits/pretrain.py --out runs/four
#   launch/local.sh --processes 8 --gpu-each --chip h100 --cache-dir ~/.cache/stepjax -- stepjax pretrain RECIPE
#
# Needs: bash 4.4 and what the command needs. The processes find each other at a free port on localhost
# (JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID). Output goes to the console, each line prefixed with
# the process's number, and is appended to LOG_DIR/process-N.log.
#
# SIGTERM and SIGINT (Ctrl-C) are forwarded to every process, which checkpoints and exits; a second signal ends stepjax
# at once. When a process fails, the others get SIGTERM a second later. The exit status is the worst of all processes:
# one that a restart does not fix, else 75 (a peer died), else 130 or 143 (stopped by a signal), else 0. With
# --restarts, all processes restart on another port after 75, and after 143 unless this script received the SIGTERM.
#
# Flags:
#   --processes N       number of processes (1)
#   --restarts N        maximum restarts (0)
#   --grace SECONDS     time to checkpoint after a signal, before SIGKILL (120)
#   --peer-grace SECONDS  time to exit after another process failed, before SIGKILL (20)
#   --delay SECONDS     pause before a restart (5)
#   --log-dir DIR       log directory (runs/logs)
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

# environment_of N PORT: sets `environment` to process N's variables.
environment_of() {
  environment=()
  if ((opt_processes > 1)); then
    environment+=("JAX_COORDINATOR_ADDRESS=127.0.0.1:$2" "JAX_NUM_PROCESSES=$opt_processes" "JAX_PROCESS_ID=$1")
  fi
  [[ -z $opt_gpu_each ]] || environment+=("JAX_LOCAL_DEVICE_IDS=$1")
  [[ -z $opt_cache_dir ]] || environment+=("JAX_COMPILATION_CACHE_DIR=$opt_cache_dir")
}

if [[ $print ]]; then
  remark "On this machine, all $opt_processes at once; the port changes with every start:"
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

type -P "${command[0]}" >/dev/null || die "program '${command[0]}' not found"
mkdir -p "$opt_log_dir"
if [[ $opt_chip ]]; then
  assignment=$(flags_of_chip "$opt_chip")
  eval "$assignment" || die "the compiler's flags for the chip '$opt_chip' could not be found"
fi

pipes=$(mktemp -d)
mkfifo "$pipes/clock"
exec 9<>"$pipes/clock"
pids=() readers=() statuses=()
received= # the first signal that this script received

kill_groups() {
  local pid
  for pid in "${pids[@]}"; do kill -KILL -- "-$pid" 2>/dev/null || true; done
}

# However this script ends, it ends the processes.
leave() {
  kill_groups
  rm -rf "$pipes"
}
trap leave EXIT

# signal_running NAME: signals the processes themselves; they end their own children.
signal_running() {
  local n
  for n in "${!pids[@]}"; do
    [[ -n ${statuses[n]-} ]] || kill "-$1" "${pids[n]}" 2>/dev/null || true
  done
}

pass_on() {
  received=${received:-$1}
  say "SIG$1: forwarded; waiting for the processes to checkpoint and exit"
  signal_running "$1"
}
trap 'pass_on TERM' TERM
trap 'pass_on INT' INT

# copy_lines N: copies standard input to the console, prefixed with the process's number, and to its log.
copy_lines() {
  trap '' TERM INT
  local line
  while IFS= read -r line || [[ $line ]]; do
    printf '%s\n' "$line" >>"$opt_log_dir/process-$1.log"
    printf '[%s] %s\n' "$1" "$line"
  done
}

# Each process gets its own process group (set -m); otherwise a terminal's Ctrl-C would reach it twice.
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

# Waits until all have exited and sets `worst`, the run's status.
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
      ((status == 0)) || say "process $n exited with status $status"
      # After a failure, statuses caused by our own signals do not count.
      if [[ $stopping ]] && ((status == 143 || status == 137)); then continue; fi
      if (($(severity "$status") > $(severity "$worst"))); then worst=$status; fi
      if [[ -z $stopping && -z $received ]] && ((status != 0)); then
        stopping=1
        deadline=$((SECONDS + opt_peer_grace + 1)) # SECONDS is rounded down
      fi
    done
    ((running)) || break
    # Give the others a second to exit by themselves, with their own status.
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
    read -r -t 0.1 -u 9 || true # sleeps without a subprocess; traps run after it
  done
  kill_groups # leftover children would keep the pipes open
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

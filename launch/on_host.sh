#!/usr/bin/env bash
# Runs on a TPU VM and keeps one run going there, whether or not anyone is logged in.
#
#   launch/on_host.sh --action start --run a --chip v6e -- stepjax pretrain RECIPE --out gs://BUCKET/a
#   launch/on_host.sh --action follow --run a
#
# tpu_vm.sh, tpu_pod.sh and queued_resource.sh copy the repository to each host and call this script there. Needs
# Linux, bash 4.4 and a .venv with stepjax in the repository.
#
#   start   starts the run in the background, logging to STATE_DIR/RUN.log; does nothing if it is already running
#   follow  prints the log until the run ends, and exits with its status
#   stop    SIGTERM: the run checkpoints and exits; SIGKILL after the grace time
#   status  prints "running", "ended STATUS" or "unknown"
#
# The run restarts, up to --restarts times, after status 75 (another host died) and after 143 (SIGTERM), unless it was
# stopped here or the machine is shutting down, in which case the system sends SIGTERM to this script too. This script
# does not forward such a signal: stepjax got it from the system, and a second one would end it without a checkpoint.
#
# Flags:
#   --action WHAT       start, follow, stop or status
#   --run NAME          the run's name
#   --restarts N        maximum restarts (10)
#   --delay SECONDS     pause before a restart (10)
#   --grace SECONDS     time to checkpoint after stop (120)
#   --chip CHIP         set the compiler's flags for it
#   --cache-dir DIR     JAX's compilation cache; on several hosts a gs:// path, because only the first host writes it
#   --distributed       join the other hosts (STEPJAX_DISTRIBUTED=auto)
#   --state-dir DIR     directory for log, process id and status (~/.stepjax)
#   --print             print what would run, and run nothing
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

flag action
flag run
flag restarts 10
flag delay 10
flag grace 120
flag chip ''
flag cache-dir ''
flag state-dir "$HOME/.stepjax"
switch distributed
parse "$@"
need_name run
need_number restarts 0
need_number delay 0
need_number grace 1
state=$opt_state_dir/$opt_run

# A run whose status file exists has ended, even if its process has not been reaped.
running() { [[ -f $state.pid && ! -f $state.status ]] && kill -0 "$(<"$state.pid")" 2>/dev/null; }

# The run's environment as shell code, the same for --print and for the run.
environment() {
  if [[ -d $repository/.venv/bin ]]; then echo "export PATH=$(quoted "$repository/.venv/bin"):\"\$PATH\""; fi
  if [[ $opt_cache_dir ]]; then echo "export JAX_COMPILATION_CACHE_DIR=$(quoted "$opt_cache_dir")"; fi
  if [[ $opt_distributed ]]; then echo "export STEPJAX_DISTRIBUTED=auto"; fi
  if [[ $opt_chip ]]; then flags_of_chip "$opt_chip" && echo; fi
}

start() {
  need_command
  if [[ $print ]]; then
    environment
    remark "In the background, until it ends or has restarted $opt_restarts times:"
    echo "$(quoted "${command[@]}") >>$(quoted "$state.log") 2>&1"
    return
  fi
  if running; then
    say "the run '$opt_run' is running already, as process $(<"$state.pid")"
    return
  fi
  mkdir -p "$opt_state_dir"
  rm -f "$state.status" "$state.stop"
  # Its own process group, for SIGKILL and to survive the end of the login.
  set -m
  (
    trap '' HUP
    supervise
  ) </dev/null >>"$state.log" 2>&1 &
  echo "$!" >"$state.pid"
  set +m
}

supervise() {
  local attempt status told='' setting
  set +m
  trap 'told=1' TERM INT
  setting=$(environment)
  status=0
  eval "$setting" || status=1
  for ((attempt = 0; status == 0; attempt++)); do
    "${command[@]}" &
    echo "$!" >"$state.child"
    status=
    while [[ -z $status ]]; do
      wait "$!" && status=0 || status=$?
      # A trapped signal ends `wait` before the process has ended.
      if kill -0 "$!" 2>/dev/null; then status=; fi
    done
    if [[ $told || -e $state.stop ]] || ((status != 75 && status != 143 || attempt >= opt_restarts)); then break; fi
    say "status $status: restart $((attempt + 1)) of $opt_restarts in $opt_delay s"
    sleep "$opt_delay" || true
    if [[ $told || -e $state.stop ]]; then break; fi
    status=0
  done
  echo "$status" >"$state.status.new"
  mv "$state.status.new" "$state.status"
}

follow() {
  if [[ $print ]]; then
    remark "Until the run ends:"
    run tail --lines=+1 --follow "$state.log"
    return
  fi
  [[ -f $state.pid ]] || die "the run '$opt_run' was not started here"
  while running; do sleep 0.2; done &
  tail --lines=+1 --follow --sleep-interval=0.2 --pid="$!" "$state.log"
  # No status: the supervisor was killed, most likely with the machine. 75: restart.
  [[ -f $state.status ]] || exit 75
  exit "$(<"$state.status")"
}

# SIGTERM goes only to the command, which ends its own children.
stop() {
  local until=$((SECONDS + opt_grace))
  if [[ $print ]]; then
    run touch "$state.stop"
    echo "kill -TERM \"\$(cat $(quoted "$state.child"))\""
    return
  fi
  if ! running; then
    say "the run '$opt_run' is not running here"
    return
  fi
  touch "$state.stop"
  kill -TERM "$(<"$state.child")" 2>/dev/null || true
  while running && ((SECONDS < until)); do sleep 0.2; done
  if running; then
    say "still running after $opt_grace s: SIGKILL"
    kill -KILL -- "-$(<"$state.pid")"
  fi
}

status() {
  if running; then
    echo running
  elif [[ -f $state.status ]]; then
    echo "ended $(<"$state.status")"
  else
    echo unknown
  fi
}

case $opt_action in
  start | follow | stop | status) "$opt_action" ;;
  *) die "--action must be start, follow, stop or status, not '$opt_action'" ;;
esac

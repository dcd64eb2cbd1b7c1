#!/usr/bin/env bash
# Run on a TPU of one or more hosts from a queued resource: requests it, waits for it and starts the run. When a spot
# TPU is preempted, it requests another one and resumes from the last checkpoint. Exits when the run has ended.
#
#   ssh-add ~/.ssh/google_compute_engine
#   launch/queued_resource.sh --name vl-spot --accelerator v5p-128 --zone ZONE --spot --cache-dir gs://BUCKET/cache \
#     -- stepjax pretrain configs/step3_vl_10b/pretrain.py --out gs://BUCKET/vl
#
# Needs: what tpu_pod.sh needs, and a machine that stays on to run this script, which makes the new requests. You may
# stop and restart it: the run and the request stay, and it picks them up. Checkpoints must be on gs://, because the
# hosts' disks go with the TPU. Exits with the run's status, or with 75 when --resubmits are used up.
#
# Flags:
#   --name NAME         name of the queued resource, the TPU and the run
#   --accelerator TYPE  such as v5p-128; see launch/tpu_types.tsv
#   --zone ZONE         default: gcloud's compute/zone
#   --project PROJECT   default: gcloud's core/project
#   --spot              use a spot TPU: cheaper, can be preempted at any time
#   --reserved          use a reservation
#   --valid-until DURATION  give up a request after this long in the queue, such as 6h
#   --image VERSION     the TPU VM's software version (default: the image for its chip)
#   --service-account ADDRESS  the TPU VM's service account, for access to buckets (default: Compute Engine's account)
#   --internal-ip       connect to the internal address, from inside its network
#   --ref REF           the commit of this repository to run (HEAD)
#   --python VERSION    the Python that uv installs there (3.12)
#   --cache-dir DIR     JAX's compilation cache: gs://BUCKET/PATH, which outlives the TPU
#   --restarts N        maximum restarts on the hosts after status 75 or 143 (10)
#   --resubmits N       maximum requests for another TPU, and restarts after the hosts' own are used up (50)
#   --poll SECONDS      pause between state checks (30)
#   --grace SECONDS     time to checkpoint after --action stop (120)
#   --keep              keep the TPU after the run; by default it is deleted
#   --action ACTION     run (default), stop (checkpoint and exit), status or delete (the request and the TPU)
#   --print             print what would run, and run nothing
source "$(dirname "${BASH_SOURCE[0]}")/tpu_lib.sh"

tpu_flags
flag valid-until ''
flag resubmits 50
flag poll 30
switch reserved
switch keep
parse "$@"
tpu_checks "run stop status delete"
need_number resubmits 0
need_number poll 0
[[ ! $opt_spot || ! $opt_reserved ]] || die "--spot and --reserved exclude each other"
need_bucket cache-dir
# shellcheck disable=SC2034  # used by tpu_lib.sh
workers=$([[ $tpu_vm_hosts == 1 ]] && echo 0 || echo all)

# The request's state, empty if there is no request. `describe` would also fail without a connection.
request_state() {
  run gcloud compute tpus queued-resources list "${where[@]}" "--filter=name ~ \"/$opt_name\$\"" \
    "--format=value(state.state)"
}

request() {
  local arguments=("--node-id=$opt_name" "--accelerator-type=$opt_accelerator")
  arguments+=("--runtime-version=${opt_image:-$tpu_image}")
  [[ -z $opt_spot ]] || arguments+=(--spot)
  [[ -z $opt_reserved ]] || arguments+=(--reserved)
  [[ -z $opt_valid_until ]] || arguments+=("--valid-until-duration=$opt_valid_until")
  [[ -z $opt_service_account ]] || arguments+=("--service-account=$opt_service_account")
  run gcloud compute tpus queued-resources create "$opt_name" "${where[@]}" "${arguments[@]}"
}

delete_request() { run gcloud compute tpus queued-resources delete "$opt_name" "${where[@]}" --force --quiet; }

finish() {
  if [[ ! $opt_keep ]] && ! delete_request; then
    say "the queued resource could not be deleted; it costs money until it is"
  fi
  exit "$1"
}

fail() {
  say "$1"
  exit 1
}

# Counts another attempt; exits with 75, as for any interrupted run, when they are used up.
tries=0
again() {
  say "$1"
  tries=$((tries + 1))
  if ((tries > opt_resubmits)); then
    say "that was the last of --resubmits $opt_resubmits"
    exit 75
  fi
}

# The TPU is ready: start the run, or keep following it. Returns when the TPU's state should be checked again.
serve() {
  local answer
  answer=$(on_host 0 status) || answer=
  # A run that has ended meanwhile is started anyway: stepjax finds its checkpoint and ends at once.
  if [[ $answer != running ]]; then
    if ! install_on_tpu || ! start_on_tpu; then
      say "the run could not be started"
      return 1
    fi
  fi
  follow_on_tpu || true
  # gcloud's own failures look like the run's, so ask the host.
  answer=$(on_host 0 status) || answer=
  case $answer in
    running) ;;
    'ended 75' | 'ended 143')
      again "the run ended with status ${answer#ended } and can be resumed"
      sleep "$opt_poll" # a preempted TPU is no longer ACTIVE by then
      if [[ $(request_state) == ACTIVE ]]; then start_on_tpu; fi
      ;;
    'ended '*) finish "${answer#ended }" ;;
    *) return 1 ;;
  esac
}

if [[ $print ]]; then
  case $opt_action in
    run)
      remark "Is there already a request, and in which state?"
      request_state
      remark "If there is none, and again after SUSPENDED (preempted) or FAILED, once the old one is deleted:"
      request
      remark "Repeat the first command every $opt_poll s until it says ACTIVE, then:"
      install_on_tpu
      start_on_tpu
      follow_on_tpu
      remark "Has the run ended, or only the connection? After 75 or 143, or if the TPU is gone, start over."
      on_host 0 status
      if [[ ! $opt_keep ]]; then
        remark "When the run has ended, and before another request:"
        delete_request
      fi
      ;;
    stop) stop_on_tpu ;;
    status) request_state && on_host "$workers" status ;;
    delete) delete_request ;;
  esac
  exit 0
fi

case $opt_action in
  stop) stop_on_tpu ;;
  status) request_state && on_host "$workers" status ;;
  delete) delete_request ;;
  run)
    failures=0 seen=
    while :; do
      if ! state=$(request_state); then
        state=UNREACHABLE
      elif [[ $state != "$seen" ]]; then
        say "state: ${state:-no request yet}"
        seen=$state failures=0
      fi
      case $state in
        '')
          if ! request; then fail "the request was refused"; fi
          ;;
        ACTIVE) if serve; then failures=0; else state=UNREACHABLE; fi ;;
        SUSPENDED | FAILED)
          again "the queued resource is $state; asking for another one"
          delete_request || state=UNREACHABLE
          ;;
      esac
      if [[ $state == UNREACHABLE ]]; then
        failures=$((failures + 1))
        ((failures < 10)) || fail "no answer for the tenth time in a row; a run on the TPU continues"
      fi
      sleep "$opt_poll"
    done
    ;;
esac

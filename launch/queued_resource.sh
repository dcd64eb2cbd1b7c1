#!/usr/bin/env bash
# A TPU, of one host or several, by way of a queued resource: asks for it, waits until it is there, runs, and when a
# spot TPU is taken away asks for another one and goes on from the last checkpoint. Stays until the run has ended.
#
#   ssh-add ~/.ssh/google_compute_engine
#   launch/queued_resource.sh --name vl-spot --accelerator v5p-128 --zone ZONE --spot --cache-dir gs://BUCKET/cache \
#     -- stepjax pretrain configs/step3_vl_10b/pretrain.py --out gs://BUCKET/vl
#
# Needs: what tpu_pod.sh needs, and a machine that stays on to run this script, for it is what asks again. It may be
# stopped (the run and the request stay) and run again: it takes up what it finds. Checkpoints must be on gs://, for
# the hosts' disks go with the TPU. Ends with the run's status; 75 when --resubmits are used up.
#
# Flags:
#   --name NAME         the queued resource's name, and the TPU's and the run's
#   --accelerator TYPE  such as v5p-128; the known ones are in launch/tpu_types.tsv
#   --zone ZONE         default: gcloud's own setting (compute/zone)
#   --project PROJECT   default: gcloud's own setting (core/project)
#   --spot              a spot TPU, cheaper, which may be taken away at any time
#   --reserved          from a reservation
#   --valid-until DURATION  give a request up that has waited this long, such as 6h
#   --image VERSION     the software that it is made with (default: the image for its chip)
#   --service-account ADDRESS  whose rights it has, to buckets for instance (default: Compute Engine's account)
#   --internal-ip       reach it by its internal address, from inside its network
#   --ref REF           the commit of this repository to run (HEAD)
#   --python VERSION    the Python to install there, by uv (3.12)
#   --cache-dir DIR     JAX's compilation cache: gs://BUCKET/PATH, which outlives the TPU
#   --restarts N        how often the hosts start the run again after status 75 or 143, at most (10)
#   --resubmits N       how often to ask for another TPU, or to start again after the last of those, at most (50)
#   --poll SECONDS      pause between looks at the state (30)
#   --grace SECONDS     time to save after --action stop (120)
#   --keep              keep the TPU when the run has ended; otherwise it is deleted
#   --action ACTION     run (the default), stop (save and leave), status or delete (the request and the TPU)
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
# shellcheck disable=SC2034  # for tpu_lib.sh
workers=$([[ $tpu_vm_hosts == 1 ]] && echo 0 || echo all)

# The request's state, empty where there is none. `describe` would fail alike for no request and for no connection.
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
    say "the queued resource could not be deleted: it costs money until it is"
  fi
  exit "$1"
}

fail() {
  say "$1"
  exit 1
}

# One more try at going on; 75, as for any run that stopped halfway, when there have been enough.
tries=0
again() {
  say "$1"
  tries=$((tries + 1))
  if ((tries > opt_resubmits)); then
    say "that was the last of --resubmits $opt_resubmits"
    exit 75
  fi
}

# The TPU is there: run, or go on watching. Returns when there is reason to look at the TPU's state again.
serve() {
  local answer
  answer=$(on_host 0 status) || answer=
  # A run that has ended meanwhile is started all the same: stepjax finds its checkpoint and ends at once.
  if [[ $answer != running ]]; then
    if ! install_on_tpu || ! start_on_tpu; then
      say "the run could not be started"
      return 1
    fi
  fi
  follow_on_tpu || true
  # gcloud's own failures look like the run's, so the host is asked.
  answer=$(on_host 0 status) || answer=
  case $answer in
    running) ;;
    'ended 75' | 'ended 143')
      again "the run ended with status ${answer#ended } and can go on"
      sleep "$opt_poll" # a TPU that is being taken away is not ACTIVE any more by then
      if [[ $(request_state) == ACTIVE ]]; then start_on_tpu; fi
      ;;
    'ended '*) finish "${answer#ended }" ;;
    *) return 1 ;;
  esac
}

if [[ $print ]]; then
  case $opt_action in
    run)
      remark "Is there a request already, and in which state?"
      request_state
      remark "If there is none, and again after SUSPENDED (taken away) or FAILED, when the old one has been deleted:"
      request
      remark "Then the first command again every $opt_poll s until it says ACTIVE, and:"
      install_on_tpu
      start_on_tpu
      follow_on_tpu
      remark "Has the run ended, or only the connection? After 75 or 143, and when the TPU is gone, all from the start."
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
        ((failures < 10)) || fail "no answer for the tenth time in a row; the run, if it is there, goes on"
      fi
      sleep "$opt_poll"
    done
    ;;
esac

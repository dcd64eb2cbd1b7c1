#!/usr/bin/env bash
# Shared by tpu_vm.sh, tpu_pod.sh and queued_resource.sh: TPU VMs reached over gcloud's ssh. Sourced, never run.
# `workers` selects the hosts: 0 or all. On the host, on_host.sh takes over.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

tpu_flags() {
  flag name
  flag accelerator
  flag zone ''
  flag project ''
  flag image ''
  flag service-account ''
  flag ref HEAD
  flag python 3.12
  flag restarts 10
  flag grace 120
  flag cache-dir ''
  flag action run
  switch spot
  switch internal-ip
}

# Call after parse: checks the flags, and sets the accelerator's facts and gcloud's location arguments.
tpu_checks() {
  local actions=$1
  need_name name
  need_number restarts 0
  need_number grace 1
  [[ " $actions " == *" $opt_action "* ]] || die "--action must be one of: $actions; not '$opt_action'"
  [[ $opt_action != run ]] || need_command
  [[ $opt_python =~ ^3\.[0-9]+$ ]] || die "--python must be a version such as 3.12, not '$opt_python'"
  read_tpu_type "$opt_accelerator"
  [[ $tpu_vm_hosts != - ]] ||
    die "$opt_accelerator is not available from the TPU API; use launch/gke_jobset.sh or launch/xpk.sh"
  where=()
  [[ -z $opt_zone ]] || where+=("--zone=$opt_zone")
  [[ -z $opt_project ]] || where+=("--project=$opt_project")
  reach=()
  [[ -z $opt_internal_ip ]] || reach+=(--internal-ip)
  need_program gcloud "the Google Cloud SDK"
}

# ssh_to WORKERS COMMAND: runs shell code on these workers of the TPU.
ssh_to() {
  run gcloud compute tpus tpu-vm ssh "$opt_name" "${where[@]}" "${reach[@]}" "--worker=$1" "--command=$2"
}

# on_host WORKERS ACTION [ARGUMENT ...]: runs on_host.sh there. A login starts in the home directory.
on_host() {
  local on=$1 action=$2
  shift 2
  ssh_to "$on" "cd stepjax && bash launch/on_host.sh $(quoted --action "$action" --run "$opt_name" "$@")"
}

# Copies the committed repository and creates its environment; the images' own Python (Ubuntu 22.04) is 3.10.
install_on_tpu() {
  local archive=${TMPDIR:-/tmp}/stepjax-$opt_name.tar.gz
  if [[ ! $print ]] && [[ -n $(git -C "$repository" status --porcelain) ]]; then
    say "uncommitted changes in the working tree are not copied; running $opt_ref"
  fi
  run git -C "$repository" archive --format=tar.gz "--output=$archive" "$opt_ref" &&
    run gcloud compute tpus tpu-vm scp "$archive" "$opt_name:stepjax.tar.gz" "${where[@]}" "${reach[@]}" \
      "--worker=$workers" &&
    ssh_to "$workers" "set -e; mkdir -p stepjax; tar -xzf stepjax.tar.gz -C stepjax; cd stepjax; \
python3 -m pip install --quiet --user uv; \
python3 -m uv venv --quiet --allow-existing --python $opt_python .venv; \
python3 -m uv pip install --quiet --python .venv/bin/python --editable '.[tpu]'"
}

start_on_tpu() {
  local arguments=(--restarts "$opt_restarts" --chip "$tpu_chip")
  [[ -z $opt_cache_dir ]] || arguments+=(--cache-dir "$opt_cache_dir")
  [[ $workers != all ]] || arguments+=(--distributed)
  on_host "$workers" start "${arguments[@]}" -- "${command[@]}"
}

follow_on_tpu() { on_host 0 follow; }

stop_on_tpu() { on_host "$workers" stop --grace "$opt_grace"; }

create_tpu_vm() {
  local arguments=("--accelerator-type=$opt_accelerator" "--version=${opt_image:-$tpu_image}")
  [[ -z $opt_spot ]] || arguments+=(--spot)
  [[ -z $opt_service_account ]] || arguments+=("--service-account=$opt_service_account")
  run gcloud compute tpus tpu-vm create "$opt_name" "${where[@]}" "${arguments[@]}"
}

# The main of tpu_vm.sh and tpu_pod.sh.
tpu_vm_main() {
  [[ $opt_create || -z $opt_spot$opt_image$opt_service_account ]] ||
    die "--spot, --image and --service-account apply only to creating the TPU: add --create, or leave them out"
  case $opt_action in
    run)
      if [[ $opt_create ]]; then create_tpu_vm; fi
      if [[ ! $opt_skip_install ]]; then install_on_tpu; fi
      start_on_tpu
      if [[ ! $opt_detach ]]; then follow_on_tpu; fi
      ;;
    follow) follow_on_tpu ;;
    stop) stop_on_tpu ;;
    status) on_host "$workers" status ;;
    delete) run gcloud compute tpus tpu-vm delete "$opt_name" "${where[@]}" --quiet ;;
  esac
}

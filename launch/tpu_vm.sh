#!/usr/bin/env bash
# One TPU VM with one host: makes it if told to, installs stepjax there, starts a run and follows its log.
#
#   launch/tpu_vm.sh --name vl-try --accelerator v6e-8 --zone ZONE --create \
#     --cache-dir gs://BUCKET/cache -- stepjax pretrain configs/digits/pretrain.py --out gs://BUCKET/digits
#   launch/tpu_vm.sh --name vl-try --accelerator v6e-8 --zone ZONE --action stop
#
# Needs: gcloud, logged in, with the TPU API enabled in the project and an SSH key that it may use; git. The
# repository is copied as it is committed. The run goes on when this script or its connection ends: --action follow
# finds it again, and the exit status is the run's. A TPU costs money until it is deleted (--action delete).
#
# Flags:
#   --name NAME         the TPU's name, and the run's
#   --accelerator TYPE  such as v6e-8; the known ones are in launch/tpu_types.tsv
#   --zone ZONE         default: gcloud's own setting (compute/zone)
#   --project PROJECT   default: gcloud's own setting (core/project)
#   --create            make the TPU first
#   --spot              as a spot TPU, cheaper, which may be taken away at any time
#   --image VERSION     the software that it is made with (default: the image for its chip)
#   --service-account ADDRESS  whose rights it has, to buckets for instance (default: Compute Engine's account)
#   --internal-ip       reach it by its internal address, from inside its network
#   --ref REF           the commit of this repository to run (HEAD)
#   --python VERSION    the Python to install there, by uv (3.12)
#   --skip-install      it has the repository and its environment already
#   --cache-dir DIR     JAX's compilation cache: a path there, or gs://BUCKET/PATH
#   --restarts N        how often the run is started again after status 75 or 143, at most (10)
#   --grace SECONDS     time to save after --action stop (120)
#   --detach            do not wait for the end
#   --action ACTION     run (the default), follow, stop (save and leave), status or delete (the TPU)
#   --print             print what would run, and run nothing
source "$(dirname "${BASH_SOURCE[0]}")/tpu_lib.sh"

# shellcheck disable=SC2034  # for tpu_lib.sh
workers=0
tpu_flags
switch create
switch skip-install
switch detach
parse "$@"
tpu_checks "run follow stop status delete"
((tpu_vm_hosts == 1)) || die "$opt_accelerator has $tpu_vm_hosts hosts; use launch/tpu_pod.sh"
tpu_vm_main

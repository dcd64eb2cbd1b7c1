#!/usr/bin/env bash
# Run on a single-host TPU VM: creates it if asked to, installs stepjax there, starts the run and follows its log.
#
#   launch/tpu_vm.sh --name vl-try --accelerator v6e-8 --zone ZONE --create \
#     --cache-dir gs://BUCKET/cache -- stepjax pretrain configs/digits/pretrain.py --out gs://BUCKET/digits
#   launch/tpu_vm.sh --name vl-try --accelerator v6e-8 --zone ZONE --action stop
#
# Needs: git, and gcloud, logged in, with an SSH key and the TPU API enabled in the project. Only committed files are
# copied. The run continues when this script or its connection ends; --action follow reconnects. The exit status is the
# run's. A TPU costs money until it is deleted (--action delete).
#
# Flags:
#   --name NAME         name of the TPU and of the run
#   --accelerator TYPE  such as v6e-8; see launch/tpu_types.tsv
#   --zone ZONE         default: gcloud's compute/zone
#   --project PROJECT   default: gcloud's core/project
#   --create            create the TPU first
#   --spot              use a spot TPU: cheaper, can be preempted at any time
#   --image VERSION     the TPU VM's software version (default: the image for its chip)
#   --service-account ADDRESS  the TPU VM's service account, for access to buckets (default: Compute Engine's account)
#   --internal-ip       connect to the internal address, from inside its network
#   --ref REF           the commit of this repository to run (HEAD)
#   --python VERSION    the Python that uv installs there (3.12)
#   --skip-install      the repository and its environment are already there
#   --cache-dir DIR     JAX's compilation cache: a path on the VM, or gs://BUCKET/PATH
#   --restarts N        maximum restarts after status 75 or 143 (10)
#   --grace SECONDS     time to checkpoint after --action stop (120)
#   --detach            do not wait for the end
#   --action ACTION     run (default), follow, stop (checkpoint and exit), status or delete (the TPU)
#   --print             print what would run, and run nothing
source "$(dirname "${BASH_SOURCE[0]}")/tpu_lib.sh"

# shellcheck disable=SC2034  # used by tpu_lib.sh
workers=0
tpu_flags
switch create
switch skip-install
switch detach
parse "$@"
tpu_checks "run follow stop status delete"
((tpu_vm_hosts == 1)) || die "$opt_accelerator has $tpu_vm_hosts hosts; use launch/tpu_pod.sh"
tpu_vm_main

#!/usr/bin/env bash
# One TPU slice of several hosts: makes it if told to, installs stepjax on every host, starts the run on all and
# follows the log of the first.
#
#   ssh-add ~/.ssh/google_compute_engine
#   launch/tpu_pod.sh --name vl-big --accelerator v5p-128 --zone ZONE --create --cache-dir gs://BUCKET/cache \
#     -- stepjax pretrain configs/step3_vl_10b/pretrain.py --out gs://BUCKET/vl
#
# Needs: what tpu_vm.sh needs, and gcloud's key in the ssh agent (the first line), for all hosts are reached at once.
# Checkpoints and the compilation cache must be where every host reaches them: gs:// paths. The hosts find each other
# by JAX's own detection (STEPJAX_DISTRIBUTED=auto). When one dies, the others leave with status 75, and each host
# starts its part again. The run goes on when this script ends. For spot TPUs use queued_resource.sh, which asks for
# another one when this one is taken away.
#
# Flags:
#   --name NAME         the TPU's name, and the run's
#   --accelerator TYPE  such as v5p-128; the known ones are in launch/tpu_types.tsv
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
#   --cache-dir DIR     JAX's compilation cache: gs://BUCKET/PATH, for only the first host writes to it
#   --restarts N        how often the run is started again after status 75 or 143, at most (10)
#   --grace SECONDS     time to save after --action stop (120)
#   --detach            do not wait for the end
#   --action ACTION     run (the default), follow, stop (save and leave), status or delete (the TPU)
#   --print             print what would run, and run nothing
source "$(dirname "${BASH_SOURCE[0]}")/tpu_lib.sh"

# shellcheck disable=SC2034  # for tpu_lib.sh
workers=all
tpu_flags
switch create
switch skip-install
switch detach
parse "$@"
tpu_checks "run follow stop status delete"
((tpu_vm_hosts > 1)) || die "$opt_accelerator has one host; use launch/tpu_vm.sh"
need_bucket cache-dir
tpu_vm_main

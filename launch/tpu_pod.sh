#!/usr/bin/env bash
# Run on a multi-host TPU slice: creates it if asked to, installs stepjax on every host, starts the run on all of them
# and follows the first host's log.
#
#   ssh-add ~/.ssh/google_compute_engine
#   launch/tpu_pod.sh --name vl-big --accelerator v5p-128 --zone ZONE --create --cache-dir gs://BUCKET/cache \
#     -- stepjax pretrain configs/step3_vl_10b/pretrain.py --out gs://BUCKET/vl
#
# Needs: what tpu_vm.sh needs, and gcloud's key in the ssh agent (first line above), to reach all hosts at once.
# Checkpoints and the compilation cache must be gs:// paths, which every host can reach. The hosts find each other by
# JAX's own detection (STEPJAX_DISTRIBUTED=auto). When one dies, the others exit with status 75, and each host restarts
# its part. The run continues when this script ends. For spot TPUs use queued_resource.sh, which requests another one
# after a preemption.
#
# Flags:
#   --name NAME         name of the TPU and of the run
#   --accelerator TYPE  such as v5p-128; see launch/tpu_types.tsv
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
#   --cache-dir DIR     JAX's compilation cache: gs://BUCKET/PATH, shared because only the first host writes it
#   --restarts N        maximum restarts after status 75 or 143 (10)
#   --grace SECONDS     time to checkpoint after --action stop (120)
#   --detach            do not wait for the end
#   --action ACTION     run (default), follow, stop (checkpoint and exit), status or delete (the TPU)
#   --print             print what would run, and run nothing
source "$(dirname "${BASH_SOURCE[0]}")/tpu_lib.sh"

# shellcheck disable=SC2034  # used by tpu_lib.sh
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

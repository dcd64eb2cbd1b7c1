#!/usr/bin/env bash
# Run on one or more TPU slices of a GKE cluster created by xpk, as an xpk workload.
#
#   launch/xpk.sh --name vl-big --cluster CLUSTER --accelerator v5p-128 --slices 2 \
#     --image REGION-docker.pkg.dev/PROJECT/REPO/stepjax:1 --cache-dir gs://BUCKET/cache \
#     -- stepjax pretrain configs/step3_vl_10b/pretrain.py --out gs://BUCKET/vl
#   xpk workload list --cluster CLUSTER
#   xpk workload delete --cluster CLUSTER --workload vl-big      # SIGTERM: checkpoints and exits
#
# Needs: xpk 1.x (pip install xpk) with gcloud and kubectl; a cluster created by `xpk cluster create`; an image with
# bash, stepjax[tpu] and the repository as working directory.
#
# The workload is a JobSet like gke_jobset.sh's, queued by Kueue. By itself xpk restarts it after the statuses 42 and
# 127 to 255, which include 143; this script adds 75. Any other status, such as 1, fails it.
#
# Flags:
#   --name NAME         the workload's name
#   --cluster NAME      the cluster's name
#   --accelerator TYPE  the slice type, such as v5p-128; see launch/tpu_types.tsv
#   --slices N          number of slices (1)
#   --image IMAGE       the container image
#   --zone ZONE         default: gcloud's compute/zone
#   --project PROJECT   default: gcloud's core/project
#   --priority LEVEL    very-low, low, medium, high or very-high (medium)
#   --cache-dir DIR     JAX's compilation cache: gs://BUCKET/PATH, shared because only the first host writes it
#   --restarts N        maximum restarts of all slices (50)
#   --grace SECONDS     time to checkpoint after SIGTERM (300)
#   --print             print what would run, and run nothing
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

flag name
flag cluster
flag accelerator
flag slices 1
flag image
flag zone ''
flag project ''
flag priority medium
flag cache-dir ''
flag restarts 50
flag grace 300
parse "$@"
need_command
need_name name
need_number slices 1
need_number restarts 0
need_number grace 1
case $opt_priority in
  very-low | low | medium | high | very-high) ;;
  *) die "--priority must be very-low, low, medium, high or very-high, not '$opt_priority'" ;;
esac
need_bucket cache-dir
read_tpu_type "$opt_accelerator"
case $opt_accelerator in
  v5litepod-1 | v5litepod-4) die "xpk has no $opt_accelerator; its smallest v5e is v5litepod-8" ;;
esac
hosts=$((tpu_chips > 4 ? tpu_chips / 4 : 1)) # xpk's nodes have four chips, even for v6e-8 and v5litepod-8
((opt_slices == 1 || hosts > 1)) ||
  die "GKE joins only multi-host slices, and $opt_accelerator has one host: --slices must be 1"
need_program xpk "pip install xpk"

arguments=("--workload=$opt_name" "--cluster=$opt_cluster" "--tpu-type=$opt_accelerator" "--num-slices=$opt_slices"
  "--docker-image=$opt_image" "--priority=$opt_priority" "--max-restarts=$opt_restarts" --restart-on-exit-codes=75
  "--termination-grace-period-seconds=$opt_grace")
[[ -z $opt_zone ]] || arguments+=("--zone=$opt_zone")
[[ -z $opt_project ]] || arguments+=("--project=$opt_project")
((opt_slices * hosts == 1)) || arguments+=(--env=STEPJAX_DISTRIBUTED=auto)
[[ -z $opt_cache_dir ]] || arguments+=("--env=JAX_COMPILATION_CACHE_DIR=$opt_cache_dir")
# xpk forwards SIGTERM to a subshell; `exec` replaces it with the command, which then checkpoints.
arguments+=("--command=$(flags_of_chip "$tpu_chip") && exec $(quoted "${command[@]}")")
run xpk workload create "${arguments[@]}"

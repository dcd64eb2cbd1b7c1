#!/usr/bin/env bash
# Run on one or more TPU slices of a GKE cluster, as a JobSet.
#
#   launch/gke_jobset.sh --name vl-big --accelerator v5p-128 --slices 2 \
#     --image REGION-docker.pkg.dev/PROJECT/REPO/stepjax:1 --cache-dir gs://BUCKET/cache \
#     -- stepjax pretrain configs/step3_vl_10b/pretrain.py --out gs://BUCKET/vl
#   kubectl get jobset vl-big;  kubectl logs --follow --selector jobset.sigs.k8s.io/jobset-name=vl-big
#   kubectl delete jobset vl-big      # SIGTERM: checkpoints and exits
#
# Needs: kubectl with access to the cluster (gcloud container clusters get-credentials CLUSTER); in the cluster, JobSet
# 0.6 or newer (for failure policy rules) and node pools with the slices; python3 on this machine; an image with
# stepjax[tpu] and the repository as working directory; a service account that can write to the bucket.
#
# GKE connects the hosts and the slices (MEGASCALE_...). Status 1 or 2 of any host fails the JobSet at once; after any
# other, all slices resume from the last checkpoint, up to --restarts times. Spot nodes give a pod only 15 seconds,
# regardless of --grace; if a save takes longer, the run resumes from the last periodic checkpoint.
#
# Flags:
#   --name NAME         the JobSet's name
#   --accelerator TYPE  the slice type, such as v5p-128; see launch/tpu_types.tsv
#   --slices N          number of slices (1)
#   --chips-per-host N  8 or 4, for v5litepod-8 and v6e-8, which GKE offers as one host of 8 chips or two of 4
#   --image IMAGE       the container image
#   --namespace NAME    (default)
#   --service-account NAME  the pods' Kubernetes service account (default)
#   --spot              use spot nodes
#   --cache-dir DIR     JAX's compilation cache: gs://BUCKET/PATH, shared because only the first host writes it
#   --restarts N        maximum restarts of all slices (50)
#   --grace SECONDS     time to checkpoint after SIGTERM (300)
#   --keep SECONDS      delete the JobSet this long after it ends (86400)
#   --context CONTEXT   kubectl's context (default: its current one)
#   --print             print what would run, including the YAML, and run nothing
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

flag name
flag accelerator
flag slices 1
flag chips-per-host ''
flag image
flag namespace default
flag service-account default
flag cache-dir ''
flag restarts 50
flag grace 300
flag keep 86400
flag context ''
switch spot
parse "$@"
need_command
need_name name
need_number slices 1
need_number restarts 0
need_number grace 1
need_number keep 0
need_bucket cache-dir
read_tpu_type "$opt_accelerator"
if [[ $tpu_chips_per_host == *,* && -z $opt_chips_per_host ]]; then
  die "GKE has $opt_accelerator as one host of 8 chips and as two of 4: choose with --chips-per-host 8 or 4"
fi
chips_per_host=${opt_chips_per_host:-$tpu_chips_per_host}
[[ ",$tpu_chips_per_host," == *",$chips_per_host,"* ]] ||
  die "--chips-per-host for $opt_accelerator must be ${tpu_chips_per_host/,/ or }, not '$chips_per_host'"
hosts=$((tpu_chips / chips_per_host))
((opt_slices == 1 || hosts > 1)) ||
  die "GKE joins only multi-host slices, and $opt_accelerator has one host: --slices must be 1"
type -P python3 >/dev/null || die "python3 is not installed; it fills in the YAML"
need_program kubectl "Kubernetes' command-line tool"

yaml=$(python3 "$launch_dir/render_jobset.py" name="$opt_name" namespace="$opt_namespace" image="$opt_image" \
  service_account="$opt_service_account" gke_accelerator="$tpu_gke" topology="$tpu_topology" spot="$opt_spot" \
  slices="$opt_slices" hosts="$hosts" chips_per_host="$chips_per_host" restarts="$opt_restarts" grace="$opt_grace" \
  keep_seconds="$opt_keep" cache_dir="$opt_cache_dir" setup="$(flags_of_chip "$tpu_chip")" -- "${command[@]}")

apply=(kubectl)
[[ -z $opt_context ]] || apply+=("--context=$opt_context")
apply+=(apply -f -)
if [[ $print ]]; then
  echo "$(quoted "${apply[@]}") <<'END_OF_YAML'"
  printf '%s\nEND_OF_YAML\n' "$yaml"
else
  "${apply[@]}" <<<"$yaml"
fi

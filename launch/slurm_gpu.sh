#!/usr/bin/env bash
# GPUs of a Slurm cluster: writes a batch job and submits it.
#
#   launch/slurm_gpu.sh --name vl-big --nodes 8 --gpus-per-node 8 --chip h100 --time 24:00:00 --partition PARTITION \
#     --cache-dir /shared/cache -- stepjax pretrain configs/step3_vl_10b/pretrain.py --out /shared/runs/vl
#   scancel ID                        # ends the job for good
#   scancel --signal=TERM ID          # to the steps only: saves, and goes on later in the queue
#
# Needs: sbatch, run in the repository on a file system that the nodes share, as checkpoints and the cache must be; an
# environment there with stepjax[cuda12] or [cuda13], and Slurm 21.08 or newer with GPUs as a resource (gres).
#
# One task a GPU, for that is what JAX's detection of Slurm takes for granted: a task's number on its node is the only
# GPU that it opens. All GPUs of a node stay visible to its tasks (no --gpus-per-task), so that NCCL uses NVLink
# between them.
#
# --warn seconds before the time limit the tasks get SIGTERM, save, and leave with status 143. After 143, and after 75
# (a peer died), the job puts itself back into the queue; with --requeue Slurm does so when it takes the nodes away or
# one fails. Status 1 or 2 ends the job. A preempted job has the time to save only if the cluster grants it one:
# GraceTime, and preempt_send_user_signal, of slurm.conf. --restarts limits how often, all reasons together.
#
# Flags:
#   --name NAME         the job's name
#   --nodes N           how many (1)
#   --gpus-per-node N   how many (8)
#   --cpus-per-gpu N    processor cores for each task (8)
#   --chip CHIP         set the compiler's flags for it (h100)
#   --time LIMIT        the job's time limit, as sbatch takes it (24:00:00)
#   --warn SECONDS      SIGTERM this long before the limit (300); Slurm may send it up to 60 s earlier
#   --peer-grace SECONDS  SIGKILL to the other tasks this long after the first has left (120)
#   --partition NAME  --account NAME  --qos NAME  --constraint FEATURES     as sbatch takes them
#   --exclusive         whole nodes
#   --venv DIR          the environment (.venv)
#   --log-dir DIR       where the log goes, NAME-ID.log (runs/logs)
#   --cache-dir DIR     JAX's compilation cache, on the shared file system, for only the first task writes to it
#   --restarts N        how often the job starts again, at most (50)
#   --print             print what would run, the batch job with it, and run nothing
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

flag name
flag nodes 1
flag gpus-per-node 8
flag cpus-per-gpu 8
flag chip h100
flag time 24:00:00
flag warn 300
flag peer-grace 120
flag partition ''
flag account ''
flag qos ''
flag constraint ''
flag venv .venv
flag log-dir runs/logs
flag cache-dir ''
flag restarts 50
switch exclusive
parse "$@"
need_command
need_name name
for name in nodes gpus-per-node cpus-per-gpu peer-grace; do need_number "$name" 1; done
need_number restarts 0
need_number warn 1
((opt_warn <= 65535)) || die "--warn must be at most 65535, Slurm's limit, not $opt_warn"
[[ $opt_time =~ ^[0-9]+(-[0-9]+)?(:[0-9]+){0,2}$ ]] ||
  die "--time must be as sbatch takes it, such as 24:00:00 or 2-12, not '$opt_time'"
[[ $opt_log_dir != *[[:space:]%\"]* ]] ||
  die "--log-dir '$opt_log_dir': sbatch would misread spaces, quotes and percent signs"
need_program sbatch "Slurm's client"

batch_job() {
  local name variable
  echo '#!/bin/bash'
  printf '#SBATCH --%s\n' "job-name=$opt_name" "nodes=$opt_nodes" "ntasks-per-node=$opt_gpus_per_node" \
    "gpus-per-node=$opt_gpus_per_node" "cpus-per-task=$opt_cpus_per_gpu" "time=$opt_time" "signal=TERM@$opt_warn" \
    requeue open-mode=append "output=$opt_log_dir/%x-%j.log"
  for name in partition account qos constraint; do
    variable=opt_$name
    if [[ ${!variable} ]]; then echo "#SBATCH --$name=$(quoted "${!variable}")"; fi
  done
  if [[ $opt_exclusive ]]; then echo "#SBATCH --exclusive"; fi
  echo
  echo "source $(quoted "$opt_venv/bin/activate") || exit 1"
  echo "$(flags_of_chip "$opt_chip") || exit 1"
  echo "export STEPJAX_DISTRIBUTED=auto"
  if [[ $opt_cache_dir ]]; then echo "export JAX_COMPILATION_CACHE_DIR=$(quoted "$opt_cache_dir")"; fi
  echo "srun $(quoted "--cpus-per-task=$opt_cpus_per_gpu" --kill-on-bad-exit=0 "--wait=$opt_peer_grace" --label \
    "${command[@]}")"
  cat <<END
status=\$?
echo "status \$status, after \${SLURM_RESTART_COUNT:-0} restarts of at most $opt_restarts" >&2
if { [ "\$status" = 75 ] || [ "\$status" = 143 ]; } && [ "\${SLURM_RESTART_COUNT:-0}" -lt $opt_restarts ]; then
  # "incomplete": a job that has been cancelled meanwhile stays so. Requeuing ends this script.
  scontrol requeue incomplete "\$SLURM_JOB_ID" && sleep 60
fi
exit "\$status"
END
}

run mkdir -p "$opt_log_dir" # Slurm does not make it
if [[ $print ]]; then
  echo "sbatch <<'END_OF_JOB'"
  batch_job
  echo END_OF_JOB
else
  job=$(batch_job)
  sbatch <<<"$job"
fi

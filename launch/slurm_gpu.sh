#!/usr/bin/env bash
# Run on GPUs of a Slurm cluster: writes a batch job and submits it.
#
#   launch/slurm_gpu.sh --name vl-big --nodes 8 --gpus-per-node 8 --chip h100 --time 24:00:00 --partition PARTITION \
#     --cache-dir /shared/cache -- stepjax pretrain configs/step3_vl_10b/pretrain.py --out /shared/runs/vl
#   scancel ID                        # ends the job for good
#   scancel --signal=TERM ID          # to the steps only: checkpoints and requeues
#
# Needs: sbatch, run in the repository on a file system that the nodes share (checkpoints and the cache must be on it
# too); an environment there with stepjax[cuda12] or [cuda13]; Slurm 21.08 or newer with GPUs as a resource (gres).
#
# Each GPU has its own task, because JAX under Slurm opens only the GPU with the task's number on its node. All GPUs of
# a node stay visible to its tasks (no --gpus-per-task), so that NCCL uses NVLink between them.
#
# --warn seconds before the time limit the tasks get SIGTERM, checkpoint, and exit with status 143. After 143, and after
# 75 (a peer died), the job requeues itself; because of --requeue, Slurm also requeues it after preemption or a node
# failure. Status 1 or 2 ends the job. A preempted job can checkpoint only if the cluster grants it time: GraceTime and
# preempt_send_user_signal in slurm.conf. --restarts limits all requeues together.
#
# Flags:
#   --name NAME         the job's name
#   --nodes N           number of nodes (1)
#   --gpus-per-node N   GPUs per node (8)
#   --cpus-per-gpu N    CPU cores per task (8)
#   --chip CHIP         set the compiler's flags for it (h100)
#   --time LIMIT        the job's time limit, as sbatch takes it (24:00:00)
#   --warn SECONDS      SIGTERM this long before the limit (300); Slurm may send it up to 60 s earlier
#   --peer-grace SECONDS  SIGKILL the other tasks this long after the first has exited (120)
#   --partition NAME  --account NAME  --qos NAME  --constraint FEATURES     as sbatch takes them
#   --exclusive         whole nodes
#   --venv DIR          the environment (.venv)
#   --log-dir DIR       directory of the log, NAME-ID.log (runs/logs)
#   --cache-dir DIR     JAX's compilation cache, on the shared file system, because only the first task writes it
#   --restarts N        maximum restarts of the job (50)
#   --print             print what would run, including the batch job, and run nothing
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
  # "incomplete": do not requeue a job that has been cancelled meanwhile. Requeuing ends this script.
  scontrol requeue incomplete "\$SLURM_JOB_ID" && sleep 60
fi
exit "\$status"
END
}

run mkdir -p "$opt_log_dir" # Slurm does not create it
if [[ $print ]]; then
  echo "sbatch <<'END_OF_JOB'"
  batch_job
  echo END_OF_JOB
else
  job=$(batch_job)
  sbatch <<<"$job"
fi

#!/usr/bin/env bash
#SBATCH --job-name=sslam
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300   # five minutes before the end: the run then writes a checkpoint and ends
#SBATCH --requeue           # allows what the last line asks for
# The published 48 clips per step on 16 devices:
# sbatch scripts/launch/slurm.sh --config pretrain_base_stage1 --output_dir runs/stage1 --per_device_train_batch_size 3 --model_config.global_loss_weight 4
set -euo pipefail
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=280  # seconds for that checkpoint; 30 by default
address=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
gpus_per_node=8
ended=0
srun bash -c "accelerate launch --config_file scripts/launch/nodes.yaml --num_machines $SLURM_NNODES \
  --num_processes $((SLURM_NNODES * gpus_per_node)) --machine_rank \$SLURM_NODEID --main_process_ip $address -m transformers_sslam pretrain ${*@Q}" || ended=$?
# Stopped at the time limit with a checkpoint: queued again, the job resumes from it. A job that failed earlier is not queued again.
left=$(squeue --job "$SLURM_JOB_ID" --noheader --format %L)
if [[ $ended != 0 && $left =~ ^0?[0-5]:[0-9][0-9]$ ]]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$ended"

#!/usr/bin/env bash
#SBATCH --job-name=sslam
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300   # five minutes before the end: the run writes a checkpoint and ends cleanly
#SBATCH --requeue           # and, queued again, goes on from it
# sbatch scripts/launch/slurm.sh scripts/recipes/pretrain_base_stage1.yaml output_dir=runs/stage1
set -euo pipefail
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=280  # seconds for that checkpoint; 30 by default
address=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
gpus_per_node=8
srun bash -c "accelerate launch --config_file scripts/launch/nodes.yaml --num_machines $SLURM_NNODES \
  --num_processes $((SLURM_NNODES * gpus_per_node)) --machine_rank \$SLURM_NODEID --main_process_ip $address scripts/pretrain.py ${*@Q}"

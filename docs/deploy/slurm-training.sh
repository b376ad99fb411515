#!/bin/bash
# A training on several machines under Slurm: sbatch docs/deploy/slurm-training.sh config.toml
# One task on each machine: torchrun starts a process for each of its GPUs.
#SBATCH --job-name=tuneproof
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@60
set -euo pipefail

settings=${1:?the settings file}
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# The checkout, its environment and models_dir lie on a file system that all machines share. run_name in the settings
# lets a job that is queued again go on from the newest checkpoint.
cd "${TUNEPROOF_DIR:-$SLURM_SUBMIT_DIR}"
export OMP_NUM_THREADS=$((SLURM_CPUS_PER_TASK / 8))

srun .venv/bin/torchrun \
    --nnodes "$SLURM_NNODES" --nproc-per-node 8 --max-restarts 3 \
    --rdzv-backend c10d --rdzv-endpoint "$head:29500" --rdzv-id "$SLURM_JOB_ID" \
    -m flows.cli finetune "$settings"

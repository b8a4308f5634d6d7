#!/usr/bin/env bash
# Trains a stream of tasks on all GPUs of one or more machines. When its time is up, the job continues in a new one:
#   sbatch --nodes 2 examples/slurm.sh --config vit.yaml --run_dir logs/vit
#SBATCH --job-name=recast_pl
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=4
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
# Only this shell gets the signal, 120 seconds before the end; the checkpoint of the last epoch is always on disk.

srun --kill-on-bad-exit=1 python -m recast_pl fit "$@" --resume true \
  --trainer.strategy ddp --trainer.num_nodes "$SLURM_NNODES" --trainer.devices "$SLURM_NTASKS_PER_NODE" &
steps=$!
trap 'scontrol requeue "$SLURM_JOB_ID"; wait "$steps"' USR1
wait "$steps"

#!/bin/bash
# Train on several nodes under SLURM, one process a GPU, over as many jobs as it takes:
#
#   sbatch examples/slurm.sh imagenet1k --data.root /data/imagenet
#
# Everything after the script's name goes to "sacl-fast train". The run folder goes by the job's
# number, which a requeued job keeps.

#SBATCH --job-name=sacl-fast
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# Five minutes before the end all processes stop after the same step, with a checkpoint.
#SBATCH --signal=USR1@300

set -uo pipefail

run="${SACL_FAST_RUN:-runs/slurm-$SLURM_JOB_ID}"
srun --kill-on-bad-exit=1 sacl-fast train "$@" --out "$run" --resume auto
status=$?

# 128 + the number of USR1: out of time, so the job goes on where it stopped.
if [ "$status" -eq $((128 + $(kill -l USR1))) ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"

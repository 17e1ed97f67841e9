#!/usr/bin/env bash
# Train under SLURM: one task per node, in which torchrun starts a process for each GPU. From the folder where the
# package is installed (or in its virtual environment), with the options of `ddpm-hf train` after the script:
#
#   sbatch training/launch/slurm.sh --config cifar10 --train_batch_size 8 --output_dir /shared/my-ddpm
#
# The lines below ask for 2 nodes of 8 GPUs; options of sbatch before the script override them:
#
#   sbatch --nodes 4 --gpus-per-node 4 --partition gpu --account me training/launch/slurm.sh …
#
# Five minutes before the time limit, and where the job is preempted, the run stops with a checkpoint, the job goes back
# into the queue, and resumes from it. Submitting the same line again resumes, too. `scancel` ends the job for good.
# The output folder must be on a disk that the first node still sees next time.

#SBATCH --job-name=ddpm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -uo pipefail

head_node="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
port=$((20000 + SLURM_JOB_ID % 10000))
echo "Attempt $((${SLURM_RESTART_COUNT:-0} + 1)) of job $SLURM_JOB_ID, on $SLURM_JOB_NODELIST."

# torchrun passes SIGTERM on to its processes, and gives them four minutes for the update and the checkpoint.
srun --kill-on-bad-exit=0 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-auto}" \
    --rdzv-backend c10d --rdzv-endpoint "$head_node:$port" --rdzv-id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
    --max-restarts 0 --shutdown-timeout 240 \
    -m ddpm_hf.training --resume_from_checkpoint latest "$@" &
step=$!

requeue=no
trap 'requeue=yes; kill -TERM "$step"' USR1 # srun passes it on to the tasks
trap : TERM # preemption and scancel signal the tasks as well, which end by themselves

# A trap interrupts `wait`, so wait until the step is gone.
while wait "$step"; status=$?; kill -0 "$step" 2>/dev/null; do :; done

# With a grace time, SLURM signals a preempted job without requeueing it. Other failures end the job: read the log.
if scontrol show job "$SLURM_JOB_ID" | grep -q 'PreemptTime=[0-9]'; then
    requeue=yes
fi
if [ "$status" -ne 0 ] && [ "$requeue" = yes ]; then
    echo "Stopped to be resumed: job $SLURM_JOB_ID goes back into the queue."
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"

#!/bin/bash
# A run on SLURM, a task a GPU, on eight machines of eight:
#   sbatch --nodes 8 examples/accelerate/slurm.sh --config examples/configs/flux1_dev_8x80gb.yaml --prompts prompts.txt
# What outgrows a card, in shards over all GPUs: SHARD=1 sbatch ... as above.
# Five minutes before its time is over, or when it is preempted, every task is told to end: they stop together and save,
# and the job goes back into the queue, from where it goes on. There is no launcher in between: torchrun would kill
# its processes 30 seconds after it is told to end.
#SBATCH --job-name=trl-tafs
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -uo pipefail

MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "${SLURM_JOB_NODELIST}" | head -n 1)}
MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
export MASTER_ADDR MASTER_PORT OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-8}}
if [ -n "${SHARD:-}" ]; then # what accelerate launch makes of fsdp2.yaml
    export ACCELERATE_USE_FSDP=true FSDP_VERSION=2 FSDP_RESHARD_AFTER_FORWARD=true
    export FSDP_AUTO_WRAP_POLICY=TRANSFORMER_BASED_WRAP FSDP_CPU_RAM_EFFICIENT_LOADING=false
fi

srun --kill-on-bad-exit=0 bash -c 'RANK=${SLURM_PROCID} LOCAL_RANK=${SLURM_LOCALID} WORLD_SIZE=${SLURM_NTASKS} \
    exec python examples/train.py "$@" --resume_from auto' task "$@"
code=$?
if [ "${code}" -eq 143 ]; then # told to end
    scontrol requeue "${SLURM_JOB_ID}"
fi
exit "${code}"

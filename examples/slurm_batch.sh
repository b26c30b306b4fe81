#!/bin/bash
# Offline data parallelism under SLURM: an engine on each GPU of two nodes, every one with its part of the prompts.
#   sbatch examples/slurm_batch.sh [MODEL]
#SBATCH --job-name=jaxserve
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=8
#SBATCH --time=01:00:00
# One failed task ends the job, and SLURM does not wait for the others.
#SBATCH --kill-on-bad-exit=1
set -euo pipefail

# srun tells each task its rank; the first node of the step is where the results come together. Each task must run the
# same code: an environment on a shared file system, or the same image.
srun --kill-on-bad-exit=1 --label python examples/data_parallel.py "$@"

# One model over all GPUs of a node instead (one task a node, a mesh config that says so):
#   srun --ntasks-per-node=1 --gpus-per-node=8 jaxserve launch --mesh examples/mesh/two_hosts.yaml -- serve MODEL

#!/usr/bin/env bash
# Submit a long run as several jobs, each resuming where the one before stopped, for clusters that do not requeue:
#   slurm/chain.sh LINKS [sbatch's options] slurm/train_multi_node.sbatch ARGUMENTS...
# If a link fails, SLURM cancels those after it.
set -euo pipefail
if (($# < 2)) || [[ ! $1 =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: slurm/chain.sh LINKS [sbatch's options] slurm/train_multi_node.sbatch ARGUMENTS..." >&2
    exit 2
fi
links=$1
shift
NEMO_DISCO_CHAIN=$(date +%s).$$
export NEMO_DISCO_CHAIN
job=
for ((link = 1; link <= links; link++)); do
    job=$(sbatch --parsable --no-requeue --kill-on-invalid-dep=yes ${job:+"--dependency=afterok:$job"} "$@")
    job=${job%%;*}
    echo "link $link of $links: job $job"
done

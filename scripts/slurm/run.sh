# What train.sbatch and train_multinode.sbatch have in common: a launcher on each node, signals, and another start.
# shellcheck shell=bash
if [ $# -lt 2 ]; then
    echo "usage: sbatch SCRIPT RUN DATA [flags of train.py ...]" >&2
    exit 2
fi
run=$1
shift
# A signal comes before the end of the time, as --signal says, or with a pre-emption; srun hands it on to its tasks.
trap 'signaled=yes; kill -USR1 "${step:-}" 2>/dev/null || true' USR1 TERM
# Steps have the cores of the job only where they are told so. By default some sites kill all tasks of a step as soon as
# one of them leaves, when the first may still be saving.
srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=0 \
    ./distributed_train.sh "${SLURM_GPUS_ON_NODE:-1}" "$@" --experiment "$run" --resume auto &
step=$!
signaled=yes
while [ -n "$signaled" ]; do # a signal ends `wait`, and not what it waits for
    signaled=
    status=0
    wait "$step" || status=$?
done
if [ "$status" = 75 ]; then # the run has saved its state and asks to be started again
    echo "Requeueing job $SLURM_JOB_ID: the run $run goes on where it was."
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"

# shellcheck shell=bash
# Functions of the sbatch scripts beside this file, which source it on the job's first node. Nothing here depends on the
# cluster.

# Seconds from the first failure until srun is killed if it still waits (a dead node never answers it).
GRACE_S=15

fail() {
    echo "error: $*" >&2
    exit 2
}

log() { echo "$(date '+%F %T') $*"; }

# Make the run directory and the logs' directory for this life of the job, RUN/logs/JOB.RESTART.
prepare() {
    [[ " $* " != *" exp_manager.explicit_log_dir="* ]] ||
        fail "instead of exp_manager.explicit_log_dir: sbatch --job-name=NAME for runs/NAME, or RUN in the environment"
    RUN=${RUN:-runs/$SLURM_JOB_NAME}
    LOGS=$RUN/logs/$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
    if ! { mkdir -p "$LOGS" && touch "$LOGS/started"; }; then
        fail "the run directory $RUN cannot be written"
    fi
    RUN=$(cd "$RUN" && pwd)
    LOGS=$(cd "$LOGS" && pwd)
    ln -sfn "${LOGS##*/}" "$RUN/logs/latest"
    # The name that all links of a chain share: an array's, or that of chain.sh.
    CHAIN=${SLURM_ARRAY_JOB_ID:-${NEMO_DISCO_CHAIN:-}}
    STOP_REQUESTED=0
    log "job $SLURM_JOB_ID, life ${SLURM_RESTART_COUNT:-0}: $SLURM_NTASKS ranks on $SLURM_JOB_NODELIST; logs in $LOGS"
}

# Set PYTHON, the interpreter that has nemo_disco, and OPTIONS, srun's options for it (the container's among them).
set_environment() {
    OPTIONS=(--kill-on-bad-exit=1)
    PYTHON=python
    if [[ -n ${CONTAINER:-} ]]; then
        OPTIONS+=("--container-image=$CONTAINER" "--container-workdir=$PWD")
        OPTIONS+=("--container-mounts=$PWD:$PWD${RUN:+,$RUN:$RUN}${MOUNTS:+,$MOUNTS}")
        return
    fi
    [[ ! -x .venv/bin/python ]] || PYTHON=$PWD/.venv/bin/python
    "$PYTHON" -c 'import nemo_disco' ||
        fail "$PYTHON has no nemo_disco: make env in $PWD, activate an environment that has it, or set CONTAINER"
}

# With ENGINE_NODES=N keep the job's last N nodes for rollout engines (ENGINES) and the others for ranks (OPTIONS).
split_nodes() {
    local nodes count
    ENGINES=()
    ((${ENGINE_NODES:-0})) || return 0
    mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    count=$((${#nodes[@]} - ENGINE_NODES))
    ((count > 0)) || fail "ENGINE_NODES=$ENGINE_NODES of ${#nodes[@]} nodes leaves none to train on: raise --nodes"
    OPTIONS+=("--nodes=$count" "--ntasks=$((SLURM_NTASKS * count / ${#nodes[@]}))")
    OPTIONS+=("--nodelist=$(IFS=, && echo "${nodes[*]:0:count}")")
    ENGINES=("generation.nodes=[$(IFS=, && echo "${nodes[*]:count}")]")
}

# run_ranks COMMAND ARGUMENTS...: run nemo-disco by srun, one rank a task, one log a rank. Returns srun's status.
run_ranks() {
    local srun failed=0
    set_environment
    split_nodes
    # srun does not inherit --cpus-per-task from sbatch.
    [[ -z ${SLURM_CPUS_PER_TASK:-} ]] || OPTIONS+=("--cpus-per-task=$SLURM_CPUS_PER_TASK")
    export PYTHONUNBUFFERED=1
    OPTIONS+=(--distribution=block "--output=$LOGS/rank_%t.log")
    srun "${OPTIONS[@]}" "$PYTHON" -m nemo_disco "$@" "${ENGINES[@]}" 2>"$LOGS/srun.log" &
    srun=$!
    trap 'STOP_REQUESTED=1; kill -USR1 "$srun" 2>/dev/null' USR1
    while kill -0 "$srun"; do
        sleep 1
        if grep -q -e 'Terminating StepId' -e ': tasks\{0,1\} [0-9]' "$LOGS/srun.log"; then
            ((++failed <= GRACE_S)) || kill -KILL "$srun"
        fi
    done 2>/dev/null
    wait "$srun" 2>/dev/null
    local status=$?
    cat "$LOGS/srun.log" >&2
    return "$status"
}

# Print the rank that failed first and the end of its log. srun names the failure that it noticed first. The FAILED line
# of a rank that raised has the time, which is the better order, but a killed rank writes none, and an aborted one may
# only have lost its peer.
print_failure() {
    local rank='' node reason line
    local by_srun='^srun: error: (.*): tasks? ([0-9]+)[^:]*: (.*)$'
    local by_rank='^FAILED [0-9.]+ rank ([0-9]+) on ([^:]*): (.*)$'
    if [[ $(grep -m 1 ': tasks\{0,1\} [0-9]' "$LOGS/srun.log") =~ $by_srun ]]; then
        node=${BASH_REMATCH[1]} rank=${BASH_REMATCH[2]} reason=${BASH_REMATCH[3]}
    fi
    line=$(grep -hs '^FAILED ' "$LOGS"/rank_*.log | sort | head -n 1)
    if [[ ${reason:-Exited} == @(Exited|Aborted)* && $line =~ $by_rank ]]; then
        rank=${BASH_REMATCH[1]} node=${BASH_REMATCH[2]} reason=${BASH_REMATCH[3]}
    fi
    if [[ -z $rank ]]; then
        echo "error: srun failed; see $LOGS/srun.log" >&2
        return
    fi
    {
        echo "error: rank $rank on $node: $reason"
        echo "--- the end of $LOGS/rank_$rank.log:"
        tail -n 50 "$LOGS/rank_$rank.log"
        echo "--- rank $rank on $node: $reason"
    } >&2
}

# finished, progressed: true if this life of the job wrote the trained model, or a checkpoint.
finished() { [[ $RUN/export -nt $LOGS/started ]]; }
progressed() {
    local saved
    saved=$(find "$RUN/checkpoints" -maxdepth 1 -name 'step_*' -newer "$LOGS/started" -print -quit 2>/dev/null)
    [[ -n $saved ]]
}

# train ARGUMENTS...: train; if the job's time ends before the run does, requeue it or leave it to the next link.
train() {
    prepare "$@"
    if [[ -n $CHAIN && -e $RUN/logs/finished.$CHAIN ]]; then
        echo "an earlier link of this chain finished the run"
        exit 0
    fi
    run_ranks train "exp_manager.explicit_log_dir=$RUN" "$@"
    local status=$?
    # SIGUSR1, the request to stop, kills a rank that is still starting or already exporting: that is no failure.
    ! grep -q 'User defined signal 1' "$LOGS/srun.log" || status=0
    if ((status)); then
        print_failure
        end_array
        exit "$status"
    elif finished; then
        [[ -z $CHAIN ]] || touch "$RUN/logs/finished.$CHAIN"
        log "finished: $RUN/export"
    else
        continue_later
    fi
    exit 0
}

# Cancel the waiting links of the array, which would fail like this one.
end_array() { [[ -z ${SLURM_ARRAY_JOB_ID:-} ]] || scancel --state=PENDING "$SLURM_ARRAY_JOB_ID"; }

# Requeue the saved run, or log how it continues.
continue_later() {
    if ! progressed; then
        end_array
        fail "stopped before one step was saved: it needs more time (--time), or an earlier warning (--signal)"
    elif [[ -n $CHAIN ]]; then
        log "saved; the next link goes on"
    elif ((STOP_REQUESTED)); then
        log "saved; requeueing job $SLURM_JOB_ID"
        scontrol requeue "$SLURM_JOB_ID" || log "not requeued; submit it again to go on"
    else
        log "saved; submit it again to go on"
    fi
}

# evaluate ARGUMENTS...: score a model; print rank 0's log.
evaluate() {
    prepare "$@"
    run_ranks evaluate "exp_manager.explicit_log_dir=$RUN" "$@"
    local status=$?
    if ((status)); then
        print_failure
    else
        cat "$LOGS/rank_0.log"
    fi
    exit "$status"
}

# convert CHECKPOINT OUT: write a checkpoint as a Hugging Face directory, in one process.
convert() {
    set_environment
    srun "${OPTIONS[@]}" --ntasks=1 "$PYTHON" -m nemo_disco.convert.megatron_to_hf "$@"
}

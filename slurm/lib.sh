# shellcheck shell=bash
# What the scripts beside this share; sourced by them on the job's first node. Nothing here is a cluster's own.

# After the first failure, so long until the job ends, whatever still hangs (a dead node never answers srun).
GRACE_S=15

fail() {
    echo "error: $*" >&2
    exit 2
}

say() { echo "$(date '+%F %T') $*"; }

# Where the run is, and the logs of this life of the job: RUN/logs/JOB.RESTART/rank_N.log.
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
    # Links of one chain: an array, or the jobs of chain.sh.
    CHAIN=${SLURM_ARRAY_JOB_ID:-${NEMO_DISCO_CHAIN:-}}
    TOLD_TO_STOP=0
    say "job $SLURM_JOB_ID, life ${SLURM_RESTART_COUNT:-0}: $SLURM_NTASKS ranks on $SLURM_JOB_NODELIST; logs in $LOGS"
}

# Which Python has nemo_disco, and what srun needs to know of it: PYTHON, OPTIONS.
environment() {
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

# With ENGINE_NODES=N the job's last N nodes are the rollout engines', and the ranks are on those before: OPTIONS, ENGINES.
divide() {
    local nodes count
    ENGINES=()
    ((${ENGINE_NODES:-0})) || return 0
    mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    count=$((${#nodes[@]} - ENGINE_NODES))
    ((count > 0)) || fail "ENGINE_NODES=$ENGINE_NODES of ${#nodes[@]} nodes leaves none to train on: more --nodes"
    OPTIONS+=("--nodes=$count" "--ntasks=$((SLURM_NTASKS * count / ${#nodes[@]}))")
    OPTIONS+=("--nodelist=$(IFS=, && echo "${nodes[*]:0:count}")")
    ENGINES=("generation.nodes=[$(IFS=, && echo "${nodes[*]:count}")]")
}

# ranks COMMAND ARGUMENTS...: nemo-disco, one rank a task, one log a rank. Its status is srun's.
ranks() {
    local srun failed=0
    environment
    divide
    # srun does not take this one over from sbatch.
    [[ -z ${SLURM_CPUS_PER_TASK:-} ]] || OPTIONS+=("--cpus-per-task=$SLURM_CPUS_PER_TASK")
    export PYTHONUNBUFFERED=1
    OPTIONS+=(--distribution=block "--output=$LOGS/rank_%t.log")
    srun "${OPTIONS[@]}" "$PYTHON" -m nemo_disco "$@" "${ENGINES[@]}" 2>"$LOGS/srun.log" &
    srun=$!
    trap 'TOLD_TO_STOP=1; kill -USR1 "$srun" 2>/dev/null' USR1
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

# The rank that failed first, and the end of its log. srun names whom it saw first; a rank that raised said when it did,
# which is the better order. One that was killed says nothing; one that aborted may have done so for a peer that failed.
post_mortem() {
    local rank='' node what word
    local seen='^srun: error: (.*): tasks? ([0-9]+)[^:]*: (.*)$' said='^FAILED [0-9.]+ rank ([0-9]+) on ([^:]*): (.*)$'
    if [[ $(grep -m 1 ': tasks\{0,1\} [0-9]' "$LOGS/srun.log") =~ $seen ]]; then
        node=${BASH_REMATCH[1]} rank=${BASH_REMATCH[2]} what=${BASH_REMATCH[3]}
    fi
    word=$(grep -hs '^FAILED ' "$LOGS"/rank_*.log | sort | head -n 1)
    if [[ ${what:-Exited} == @(Exited|Aborted)* && $word =~ $said ]]; then
        rank=${BASH_REMATCH[1]} node=${BASH_REMATCH[2]} what=${BASH_REMATCH[3]}
    fi
    if [[ -z $rank ]]; then
        echo "error: srun failed; see $LOGS/srun.log" >&2
        return
    fi
    {
        echo "error: rank $rank on $node: $what"
        echo "--- the end of $LOGS/rank_$rank.log:"
        tail -n 50 "$LOGS/rank_$rank.log"
        echo "--- rank $rank on $node: $what"
    } >&2
}

# Whether this life of the job wrote the trained model, and a checkpoint.
finished() { [[ $RUN/export -nt $LOGS/started ]]; }
progressed() {
    local saved
    saved=$(find "$RUN/checkpoints" -maxdepth 1 -name 'step_*' -newer "$LOGS/started" -print -quit 2>/dev/null)
    [[ -n $saved ]]
}

# train ARGUMENTS...: train, and if the time is up before the run is, see to it that it goes on.
train() {
    prepare "$@"
    if [[ -n $CHAIN && -e $RUN/logs/finished.$CHAIN ]]; then
        echo "an earlier link of this chain finished the run"
        exit 0
    fi
    ranks train "exp_manager.explicit_log_dir=$RUN" "$@"
    local status=$?
    # A rank that was still starting, or already exporting, dies of the request to stop: no failure.
    ! grep -q 'User defined signal 1' "$LOGS/srun.log" || status=0
    if ((status)); then
        post_mortem
        end_array
        exit "$status"
    elif finished; then
        [[ -z $CHAIN ]] || touch "$RUN/logs/finished.$CHAIN"
        say "finished: $RUN/export"
    else
        go_on
    fi
    exit 0
}

# The next links would fail like this one.
end_array() { [[ -z ${SLURM_ARRAY_JOB_ID:-} ]] || scancel --state=PENDING "$SLURM_ARRAY_JOB_ID"; }

go_on() {
    if ! progressed; then
        end_array
        fail "stopped before one step was saved: it needs more time (--time), or a longer warning of its end (--signal)"
    elif [[ -n $CHAIN ]]; then
        say "saved; the next link goes on"
    elif ((TOLD_TO_STOP)); then
        say "saved; requeueing job $SLURM_JOB_ID"
        scontrol requeue "$SLURM_JOB_ID" || say "not requeued; submit it again to go on"
    else
        say "saved; submit it again to go on"
    fi
}

# evaluate ARGUMENTS...
evaluate() {
    prepare "$@"
    ranks evaluate "exp_manager.explicit_log_dir=$RUN" "$@"
    local status=$?
    if ((status)); then
        post_mortem
    else
        cat "$LOGS/rank_0.log"
    fi
    exit "$status"
}

# convert CHECKPOINT OUT: one process.
convert() {
    environment
    srun "${OPTIONS[@]}" --ntasks=1 "$PYTHON" -m nemo_disco.convert.megatron_to_hf "$@"
}

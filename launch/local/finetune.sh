#!/usr/bin/env bash
# Fine-tune on this machine, one process a GPU.
#   launch/local/finetune.sh RECIPE [section.key=value ...] [--resume] [--dry-run]
#   LAUNCHER=torchrun|accelerate|deepspeed (default torchrun)   PROCESSES=N (default: the number of GPUs, 1 without any)
#   ENGINE=ddp|zero1|zero2|zero3|fsdp2 (default ddp, with deepspeed zero2; any file of ds_configs by its name)
# The exit code is training's: 0 done, 2 an error that its message explains, 75 stopped by SIGTERM and 130 by Ctrl-C (go on with
# --resume), 1 crashed. Written by `python -m curvelora_training.launch.scripts`; change this copy as you like.
# shellcheck disable=SC2317,SC2329 # the functions are called where they are exported to
set -euo pipefail

fail() {
    echo "error: $*" >&2
    exit 2
}

if (($# < 1)); then
    sed -n '2,5s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
recipe=$1
shift
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export LAUNCHER=${LAUNCHER:-torchrun} CONFIGS=${CONFIGS:-$here/../../ds_configs}
export ENGINE=${ENGINE:-$([[ $LAUNCHER == deepspeed ]] && echo zero2 || echo ddp)}
case $LAUNCHER in
    torchrun | accelerate | deepspeed) ;;
    *) fail "LAUNCHER=$LAUNCHER is none of torchrun, accelerate, deepspeed" ;;
esac
engine=()
case $ENGINE in
    ddp) [[ $LAUNCHER != deepspeed ]] || fail "LAUNCHER=deepspeed always runs DeepSpeed: take ENGINE=zero2, or another launcher" ;;
    fsdp2) [[ $LAUNCHER == accelerate ]] || fail "ENGINE=fsdp2 is asked for by an Accelerate configuration: add LAUNCHER=accelerate" ;;
    *)
        [[ -f $CONFIGS/$ENGINE.json ]] || fail "ENGINE=$ENGINE is neither ddp, nor fsdp2, nor a file $CONFIGS/$ENGINE.json"
        engine=("training.deepspeed=$CONFIGS/$ENGINE.json")
        ;;
esac
PROCESSES=${PROCESSES:-$(python -c 'import torch; print(torch.cuda.device_count() or 1)')}
export PROCESSES
export NODES=1 NODE_RANK=0 HEAD=127.0.0.1 NODE_NAMES=localhost ATTEMPT=local-$$ MEETING=600
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300} # seconds that processes have to save
# Below the ephemeral range, and nobody answers: another job on this machine has another one.
for ((; ; )); do
    PORT=$((10000 + RANDOM % 20000))
    (exec 3<>"/dev/tcp/127.0.0.1/$PORT") 2>/dev/null || break
done
export PORT

# One process of the training, started by the launcher. `exec`: signals, exit code and number are Python's own.
process() {
    exec >>"$LOGS/node$NODE_RANK-rank$RANK.log" 2>&1
    heading
    echo "$BASHPID" >"$SCRATCH/pids/$RANK"
    exec python -m "$MODULE" "$@"
}

heading() { echo "=== $(hostname), attempt $ATTEMPT, $(date -u +%FT%TZ)" || :; } # a full disk is training's to explain

# One node's share of a step: the launcher, which runs the command once for each process. Returns the processes' own exit code.
node() {
    local code launcher interrupted threads=$(($(nproc) / PROCESSES))
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
    # On the node: a build that was killed leaves a lock behind, on which the next one would wait for ever.
    SCRATCH=$(mktemp -d)
    export SCRATCH TORCH_EXTENSIONS_DIR=$SCRATCH/extensions TRITON_CACHE_DIR=$SCRATCH/triton CURVELORA_EXIT_CODES=$SCRATCH/codes
    mkdir "$CURVELORA_EXIT_CODES" "$SCRATCH/pids"
    # Where SLURM tracks processes by cgroups it signals this shell alone, elsewhere the launcher and its processes too. So the
    # shell hands signals on, to training itself: the warning would end a launcher, which ignores it, and not all of them hand
    # SIGTERM on. Twice does no harm.
    trap 'pass_on_to_processes USR1' USR1
    trap 'pass_on_to_processes TERM' TERM
    trap 'pass_on_to_processes INT' INT
    (
        trap '' USR1
        trap : TERM INT
        launch "$@"
    ) &
    launcher=$!
    while :; do # a signal that is trapped interrupts `wait`
        interrupted='' code=0
        wait "$launcher" || code=$?
        [[ -n $interrupted ]] || break
    done
    [[ $code == 0 ]] || as_they_said
    rm -rf "$SCRATCH"
    return "$code"
}

pass_on_to_processes() {
    local pids
    interrupted=1
    mapfile -t pids < <(cat "$SCRATCH"/pids/* 2>/dev/null)
    ((${#pids[@]} == 0)) || kill "-$1" "${pids[@]}" 2>/dev/null || :
}

# Launchers answer 1 whatever their processes said. Sets $code: 2 is an error that its message explains, 75 and 130 are stopped by
# a signal, where every process has said something: 0 are those that had no more to do while the first one scored. A crash says
# nothing. (Not by `$(...)`: SIGTERM would end that.)
as_they_said() {
    local said different
    said=$(cat "$CURVELORA_EXIT_CODES"/* 2>/dev/null | wc -l) || said=0
    different=$(sort -nu "$CURVELORA_EXIT_CODES"/* 2>/dev/null | xargs) || different=''
    case "$said of $PROCESSES: $different" in
        *" 2" | *" 2 "*) code=2 ;;
        "$PROCESSES of $PROCESSES: 0") code=0 ;;
        "$PROCESSES of $PROCESSES: 75" | "$PROCESSES of $PROCESSES: 0 75") code=75 ;;
        "$PROCESSES of $PROCESSES: 130" | "$PROCESSES of $PROCESSES: 0 130") code=130 ;;
        *) code=1 ;;
    esac
}

with_torchrun() {
    torchrun --nnodes "$NODES" --nproc-per-node "$PROCESSES" --node-rank "$NODE_RANK" --max-restarts 0 \
        --master-addr "$HEAD" --master-port "$PORT" --rdzv-id "$ATTEMPT" --rdzv-conf "timeout=$MEETING" --no-python "$@"
}

with_accelerate() {
    local configuration=ddp
    [[ $ENGINE != fsdp2 ]] || configuration=fsdp2
    accelerate launch --config_file "$CONFIGS/accelerate_$configuration.yaml" \
        --num_machines "$NODES" --num_processes $((NODES * PROCESSES)) --machine_rank "$NODE_RANK" \
        --main_process_ip "$HEAD" --main_process_port "$PORT" --rdzv_backend static --rdzv_conf "timeout=$MEETING" \
        --max_restarts 0 --no_python "$@"
}

with_deepspeed() {
    local name
    for name in $NODE_NAMES; do echo "$name slots=$PROCESSES"; done >"$SCRATCH/hostfile"
    deepspeed --hostfile "$SCRATCH/hostfile" --no_ssh --node_rank "$NODE_RANK" \
        --master_addr "$HEAD" --master_port "$PORT" --no_local_rank --no_python "$@"
}

launch() { "with_$LAUNCHER" "$@"; }
export -f with_torchrun with_accelerate with_deepspeed
export -f process heading node pass_on_to_processes as_they_said launch

child='' interrupted=''
in_session() { # in_session COMMAND...: under the launcher, in a session of its own; its exit code is in $code
    # So a signal reaches the launcher and all that it started, and nothing else.
    setsid bash -c 'node "$@"' node "$@" &
    child=$!
    while :; do # a signal that is trapped interrupts `wait`
        interrupted='' code=0
        wait "$child" || code=$?
        [[ -n $interrupted ]] || break
    done
    child=''
}

pass_on() {
    interrupted=1 stopping=1
    [[ -z $child ]] || kill "-$1" -- "-$child" 2>/dev/null || :
}
stopping=''
trap 'pass_on INT' INT
trap 'pass_on TERM' TERM HUP USR1 # launchers hand SIGTERM on, and not SIGUSR1

code=0
[[ -n $stopping ]] || in_session python -m curvelora_training.finetune --config "$recipe" "${engine[@]}" "$@"
exit "$code"

#!/usr/bin/env bash
# Fine-tune on several machines without SLURM. The clone, the run folder, model and rows have the same paths on all of them.
#   HOSTFILE=hosts launch/multinode/finetune.sh RECIPE [section.key=value ...]              from here, by ssh without a password
#   NODE_RANK=0 HOSTFILE=hosts launch/multinode/finetune.sh RECIPE [section.key=value ...]  by hand on each machine, in order 0, 1, ...
# HOSTFILE has a line for each machine, the first one leads:    host1 slots=8
#   RUN=DIR (default runs/RECIPE)    LAUNCHER=torchrun|accelerate|deepspeed    ENGINE=ddp|zero1|zero2|zero3|fsdp2
#   HEAD=ADDRESS of the first machine in the fast network (default: its name)  PORT=N (two ports from N on; default: from the run folder)
#   PREFLIGHT=0 leaves out the check of the machines before training           SSH="ssh -p 2222"
# Logs: RUN/logs/node*-rank*.log. The same command goes on where a run was stopped. Ctrl-C or SIGTERM stop all machines, with a
# checkpoint. The exit code is training's: 0 done, 2 an error that its message explains, 75 stopped, 1 crashed.
# Written by `python -m curvelora_training.launch.scripts`; change this copy as you like.
# shellcheck disable=SC2153,SC2317,SC2329 # RANK is the launcher's; the functions are called where they are exported to
set -euo pipefail

fail() {
    echo "error: $*" >&2
    exit 2
}

if (($# < 1)) || [[ -z ${HOSTFILE:-} ]]; then
    sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
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

[[ -r $HOSTFILE ]] || fail "the hostfile $HOSTFILE cannot be read"
hosts=() slots=''
while read -r host rest || [[ -n $host ]]; do
    [[ -n $host && $host != \#* ]] || continue
    [[ $host =~ ^[A-Za-z0-9][A-Za-z0-9._-]*$ ]] || fail "$HOSTFILE: '$host' is no name of a machine"
    [[ $rest =~ ^slots=([1-9][0-9]*)$ ]] || fail "$HOSTFILE: a line is like '$host slots=8', not '$host $rest'"
    [[ ${slots:-${BASH_REMATCH[1]}} == "${BASH_REMATCH[1]}" ]] || fail "$HOSTFILE: all machines must have as many slots as the first"
    slots=${BASH_REMATCH[1]}
    hosts+=("$host")
done <"$HOSTFILE"
((${#hosts[@]})) || fail "$HOSTFILE names no machine"

name=${recipe##*/}
RUN=${RUN:-runs/${name%.yaml}}
[[ $RUN == /* ]] || RUN=$PWD/$RUN
export RUN LOGS=$RUN/logs MODULE=curvelora_training.finetune
export NODES=${#hosts[@]} PROCESSES=$slots NODE_NAMES=${hosts[*]} HEAD=${HEAD:-${hosts[0]}} MEETING=600
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300} # seconds that processes have to save
# Below the ephemeral range, the same on all machines, and another one for another run.
PORT=${PORT:-$((10000 + $(cksum <<<"$RUN" | cut -d ' ' -f 1) % 20000))}
mkdir -p "$LOGS" "$RUN/launch"

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

# --- one machine's part ------------------------------------------------------------------------------------------------------

if [[ -n ${NODE_RANK:-} ]]; then
    [[ $NODE_RANK =~ ^[0-9]+$ && $NODE_RANK -lt $NODES ]] ||
        fail "NODE_RANK=$NODE_RANK: the machines of $HOSTFILE are 0 to $((NODES - 1))"
    export NODE_RANK PORT ATTEMPT=${ATTEMPT:-$PORT}
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
    if [[ -n ${STARTED_BY_SSH:-} ]]; then # which hangs up when all are to stop
        exec 3<&0 >>"$LOGS/node$NODE_RANK.log" 2>&1
        (cat <&3 >/dev/null && kill -TERM $$) &
        watcher=$!
    fi
    code=0
    [[ ${PREFLIGHT:-1} == 0 ]] ||
        in_session python -m curvelora_training.preflight --run-folder "$RUN" --json "$RUN/launch/preflight.json"
    if [[ $code == 0 && -z $stopping ]]; then
        export PORT=$((PORT + 1)) # the first one may be held for a minute after its use
        # --resume starts afresh where there is nothing to continue from
        in_session bash -c 'process "$@"' process --config "$recipe" "output=$RUN" "${engine[@]}" --resume "$@"
    fi
    [[ -z ${watcher:-} ]] || kill "$watcher" 2>/dev/null || :
    exit "$code"
fi

# --- all machines, from here --------------------------------------------------------------------------------------------------

for ((tries = 0; tries < 100; tries++)); do
    (exec 3<>"/dev/tcp/$HEAD/$PORT") 2>/dev/null || (exec 3<>"/dev/tcp/$HEAD/$((PORT + 1))") 2>/dev/null || break # nobody answers
    PORT=$((10000 + (PORT + 7919) % 20000))
done
ATTEMPT=$PORT-$(date +%s) STARTED_BY_SSH=1
export PORT
# What a machine's part is told; a shell that ssh starts has little of this one's environment. No secrets: `ps` shows them all.
kept=()
while read -r variable; do
    [[ ! $variable =~ ^(HF_|NCCL_|GLOO_|TORCH_|CUDA_|OMP_|CURVELORA_) || $variable =~ TOKEN|SECRET|PASSWORD|KEY ]] || kept+=("$variable=${!variable}")
done < <(compgen -e)
for variable in PATH PYTHONPATH RUN HOSTFILE HEAD PORT ATTEMPT LAUNCHER ENGINE CONFIGS PREFLIGHT DS_ACCELERATOR STARTED_BY_SSH; do
    [[ -z ${!variable:-} ]] || kept+=("$variable=${!variable}")
done

pipes=$(mktemp -d) holders=() running=()
stop_all() { # the end of its input tells a machine's part to stop
    ((${#holders[@]})) || return 0
    kill "${holders[@]}" 2>/dev/null || :
    holders=()
}
trap 'stop_all; rm -rf "$pipes"' EXIT
trap 'echo "asked to stop: training saves a checkpoint and leaves" >&2; stop_all' INT TERM HUP USR1
read -r -a ssh <<<"${SSH:-ssh -o BatchMode=yes}"
for rank in "${!hosts[@]}"; do
    mkfifo "$pipes/$rank"
    sleep infinity >"$pipes/$rank" &
    holders+=($!)
    printf -v command '%q ' env "${kept[@]}" NODE_RANK="$rank" bash "$here/$(basename "$0")" "$recipe" "$@"
    printf -v folder '%q' "$PWD"
    case ${hosts[rank]} in
        localhost | "$(hostname)" | "$(hostname -s)") bash -c "cd $folder && exec $command" <"$pipes/$rank" & ;;
        *) "${ssh[@]}" "${hosts[rank]}" "cd $folder && exec $command" <"$pipes/$rank" & ;;
    esac
    running+=($!)
done
echo "started on ${hosts[*]}, port $PORT; logs: $LOGS/node*-rank*.log"

first=0
while ((${#running[@]})); do
    for rank in "${!running[@]}"; do
        ! kill -0 "${running[rank]}" 2>/dev/null || continue
        code=0
        wait "${running[rank]}" || code=$?
        unset "running[rank]"
        [[ $code != 0 ]] || continue
        if [[ $first == 0 ]]; then
            first=$code
            [[ $code != 255 ]] || echo "ssh to ${hosts[rank]} failed, or was lost" >&2
            echo "${hosts[rank]} ended with code $code: the others are stopped" >&2
        fi
        stop_all
    done
    sleep 1 || :
done
exit "$first"

#!/usr/bin/env bash
# Fine-tune on this machine, one process a GPU.
#   launch/local/finetune.sh RECIPE [section.key=value ...]
#   LAUNCHER=torchrun|accelerate|deepspeed (default torchrun)   PROCESSES=N (default: the number of GPUs, 1 without any)
set -euo pipefail

if [ $# -lt 1 ]; then
    sed -n '2,4s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
recipe=$1
shift
processes=${PROCESSES:-$(python -c 'import torch; print(torch.cuda.device_count() or 1)')}
module=curvelora_training.finetune

case ${LAUNCHER:-torchrun} in
    # --standalone picks a free port, so two jobs on one machine do not collide
    torchrun) exec torchrun --standalone --nproc-per-node "$processes" -m "$module" --config "$recipe" "$@" ;;
    accelerate)
        exec accelerate launch --config_file "$(dirname "$0")/../../ds_configs/accelerate_ddp.yaml" \
            --num_processes "$processes" --main_process_port 0 -m "$module" --config "$recipe" "$@"
        ;;
    # --num_gpus counts CPU processes on a machine without GPUs
    deepspeed) exec deepspeed --num_gpus "$processes" --module "$module" --config "$recipe" "$@" ;;
    *)
        echo "error: LAUNCHER=$LAUNCHER is none of torchrun, accelerate, deepspeed" >&2
        exit 2
        ;;
esac

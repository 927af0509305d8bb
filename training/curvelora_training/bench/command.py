"""Measure what a nonlinear adapter costs, whether it is stable and whether it is there at all, beside QLoRA.

Everything is measured for several arms on the same base and the same batches; the first arm is the baseline. Built-in shapes
(random weights): llama-1b, llama2-7b, llama2-13b, llama2-70b, llama3-8b, llama3-70b.
"""

_HERE = "curvelora_training.bench"
COMMANDS = {
    "layer": (f"{_HERE}.layer_command", "one linear layer, forward and backward"),
    "kernels": (f"{_HERE}.kernels_command", "the fused kernels of one layer, and their tiles"),
    "step": (f"{_HERE}.step_command", "whole training steps on a model or a built-in shape"),
    "profile": (f"{_HERE}.profile_command", "where the GPU's time of a training step goes"),
    "engines": (f"{_HERE}.engines_command", "whole training steps under DeepSpeed's ZeRO stages, by torchrun"),
    "compare": (
        f"{_HERE}.compare_command",
        "the cost, then training of every arm and seed, presence, spectra, and a report",
    ),
    "eval": ("curvelora_eval.speed.command", "the engine of `curvelora eval` beside the papers' batch-1 loop"),
    "report": (f"{_HERE}.report_command", "the report of `compare` again, for example with another sweep"),
}

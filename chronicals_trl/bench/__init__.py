"""Benchmarks: `chronicals-trl bench ops` times the fused ops, `bench head` the head with its loss, `bench lora` a
decoder layer with LoRA, each against eager torch, torch.compile and other libraries; `bench sft` trains with us and
with every peer.

    timing.py        one callable on a GPU, forward or backward, without the host; on the host alone; copy bandwidth
    common.py        what both benchmarks share
    ops.py           what is timed: ops, shapes, the sides that compete, and how many bytes each op has to move
    run.py           checks every side against fp64, times it, gathers rows
    verdict.py       the targets, met or missed
    report.py        table, JSON and plot
    head.py, head_check.py, head_run.py, head_verdict.py, head_report.py: the same for the head
    sft.py           whole runs: shapes, documents, protocols, sides
    sft_run.py       runs each side in a process of its own, gathers rows
    sft_worker.py    such a process; sft_sides.py: how each side trains; sft_meter.py, sft_count.py: what is measured
    sft_models.py, sft_attention.py, sft_compile.py: the model; a peer's attention; the bare loop
    sft_verdict.py, sft_report.py, sft_command.py: which rows are valid, and targets; table and plot; arguments
    lora.py, lora_layer.py, lora_sides.py, lora_check.py, lora_timing.py, lora_measure.py, lora_run.py, lora_worker.py,
    lora_verdict.py, lora_report.py, lora_command.py: the same for one decoder layer with LoRA
    command.py       the command line

Nothing of the rest of the package imports this one.
"""

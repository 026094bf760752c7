"""Full fine-tuning of a causal language model on packed rows.

    python examples/full_finetune.py --model DIR_OR_NAME --data train.jsonl

`--data` is a JSON Lines file in any of TRL's formats: {"text": ...}, {"messages": [...]} or
{"prompt": ..., "completion": ...}. Against a script for stock TRL two things differ: the import, and the flag.
"""

import argparse

import torch
from datasets import load_dataset

from chronicals_trl import SFTConfig, SFTTrainer  # instead of: from trl import SFTConfig, SFTTrainer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", required=True)
parser.add_argument("--data", required=True)
parser.add_argument("--output_dir", default="outputs/full-finetune")
parser.add_argument("--max_steps", type=int, default=-1, help="-1: one epoch")
parser.add_argument("--max_length", type=int, default=2048, help="tokens in a packed row")
options = parser.parse_args()

trainer = SFTTrainer(
    model=options.model,
    args=SFTConfig(
        output_dir=options.output_dir,
        use_chronicals=True,
        use_cpu=not torch.accelerator.is_available(),  # TRL trains in bf16, and on a CPU wants that said
        packing=True,
        # A document longer than a row is cut in pieces; "bfd" would drop what does not fit.
        packing_strategy="bfd_split",
        max_length=options.max_length,
        per_device_train_batch_size=4,
        learning_rate=2e-5,
        warmup_steps=0.03,
        lr_scheduler_type="cosine",
        num_train_epochs=1,
        max_steps=options.max_steps,
        save_strategy="no",
    ),
    train_dataset=load_dataset("json", data_files=options.data, split="train"),
)
trainer.train()
trainer.save_model()
# What was on, and what was left out and why; the same table is printed when training starts.
trainer.accelerator.print(trainer.chronicals_report.render())

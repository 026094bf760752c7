"""Training on a data set that is read while it is trained on, and never lies on the disk or in memory as a whole.

    python examples/streaming.py --model DIR_OR_NAME --data 'shards/*.jsonl' --max_steps 1000

`--data` is a pattern of JSON Lines files in any of TRL's formats; a data set of the Hub streams in the same way. A
stream has no length, so `--max_steps` says where to stop. Packing looks at a window of documents at a time: the larger
the window, the fuller the rows, and the longer until the first one comes.
"""

import argparse

import torch
from datasets import load_dataset

from chronicals_trl import SFTConfig, SFTTrainer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", required=True)
parser.add_argument("--data", required=True)
parser.add_argument("--output_dir", default="outputs/streaming")
parser.add_argument("--max_steps", type=int, required=True)
parser.add_argument("--max_length", type=int, default=2048, help="tokens in a packed row")
parser.add_argument("--window", type=int, default=10_000, help="documents that are packed together")
options = parser.parse_args()

trainer = SFTTrainer(
    model=options.model,
    args=SFTConfig(
        output_dir=options.output_dir,
        use_chronicals=True,
        use_cpu=not torch.accelerator.is_available(),  # TRL trains in bf16, and on a CPU wants that said
        chronicals_config={"packing_window": options.window},
        packing=True,
        max_length=options.max_length,
        per_device_train_batch_size=4,
        learning_rate=2e-5,
        warmup_steps=0.03,
        max_steps=options.max_steps,
        # A checkpoint keeps the place in the stream: trainer.train(resume_from_checkpoint=True) goes on from there.
        save_strategy="steps",
        save_steps=500,
        save_total_limit=1,
    ),
    train_dataset=load_dataset("json", data_files=options.data, split="train", streaming=True),
)
trainer.train()
trainer.save_model()
trainer.accelerator.print(trainer.chronicals_report.render())

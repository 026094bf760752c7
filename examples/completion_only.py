"""Learning from the answers alone: prompts are read, but nothing is learned from them.

    python examples/completion_only.py --model DIR_OR_NAME --data train.jsonl

`--data` is a JSON Lines file of {"prompt": ..., "completion": ...}, both texts or both lists of messages. Tokens of
the prompt are labelled -100, and the mean is over the completions' tokens. For whole chats, {"messages": [...]}, the
setting is `assistant_only_loss=True`.
"""

import argparse

import torch
from datasets import load_dataset

from chronicals_trl import SFTConfig, SFTTrainer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", required=True)
parser.add_argument("--data", required=True)
parser.add_argument("--output_dir", default="outputs/completion-only")
parser.add_argument("--max_steps", type=int, default=-1, help="-1: one epoch")
parser.add_argument("--max_length", type=int, default=2048, help="tokens in a packed row")
options = parser.parse_args()

dataset = load_dataset("json", data_files=options.data, split="train").train_test_split(test_size=0.05, seed=0)

trainer = SFTTrainer(
    model=options.model,
    args=SFTConfig(
        output_dir=options.output_dir,
        use_chronicals=True,
        use_cpu=not torch.accelerator.is_available(),  # TRL trains in bf16, and on a CPU wants that said
        packing=True,
        completion_only_loss=True,  # the default for prompt-completion data; False learns from the prompts too
        max_length=options.max_length,
        per_device_train_batch_size=4,
        learning_rate=2e-5,
        num_train_epochs=1,
        max_steps=options.max_steps,
        save_strategy="no",
    ),
    train_dataset=dataset["train"],
    eval_dataset=dataset["test"],  # packed as well, and documents are kept apart there too
)
trainer.train()
trainer.save_model()
trainer.accelerator.print(f"loss on held-out completions: {trainer.evaluate()['eval_loss']:.4f}")

"""LoRA fine-tuning: fused adapters, and LoRA+ (B learns at a higher rate than A).

    python examples/lora.py --model DIR_OR_NAME --data train.jsonl

`--data` is a JSON Lines file in any of TRL's formats. For a base model in 4 bits see qlora.py.
"""

import argparse

import torch
from datasets import load_dataset
from peft import LoraConfig

from chronicals_trl import SFTConfig, SFTTrainer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", required=True)
parser.add_argument("--data", required=True)
parser.add_argument("--output_dir", default="outputs/lora")
parser.add_argument("--max_steps", type=int, default=-1, help="-1: one epoch")
parser.add_argument("--max_length", type=int, default=2048, help="tokens in a packed row")
options = parser.parse_args()

trainer = SFTTrainer(
    model=options.model,
    args=SFTConfig(
        output_dir=options.output_dir,
        use_chronicals=True,
        use_cpu=not torch.accelerator.is_available(),  # TRL trains in bf16, and on a CPU wants that said
        model_init_kwargs={"dtype": "bfloat16"},  # the frozen weights; TRL's default is float32, twice the memory
        # LoRA+ is on by default: learning_rate is A's, and B gets 16 times that. With {"lora_plus": "off"} both get
        # the same, and the usual rates for LoRA (1e-4 to 1e-3) are the ones to take.
        chronicals_config={"lora_plus_ratio": 16.0},
        learning_rate=5e-5,
        packing=True,
        max_length=options.max_length,
        per_device_train_batch_size=4,
        warmup_steps=0.03,
        num_train_epochs=1,
        max_steps=options.max_steps,
        save_strategy="no",
    ),
    train_dataset=load_dataset("json", data_files=options.data, split="train"),
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
)
trainer.train()
trainer.save_model()  # the adapter alone

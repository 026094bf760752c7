"""QLoRA: adapters on a model whose weights stay frozen in 4 bits (bitsandbytes, and a GPU for any real model).

    pip install 'bitsandbytes>=0.46.1'
    python examples/qlora.py --model DIR_OR_NAME --data train.jsonl

`--data` is a JSON Lines file in any of TRL's formats. Against lora.py, `quantization_config` is all that is new: the
fused adapters unpack a weight for the multiplication that needs it, and forget it again.
"""

import argparse

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import BitsAndBytesConfig

from chronicals_trl import SFTConfig, SFTTrainer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", required=True)
parser.add_argument("--data", required=True)
parser.add_argument("--output_dir", default="outputs/qlora")
parser.add_argument("--max_steps", type=int, default=-1, help="-1: one epoch")
parser.add_argument("--max_length", type=int, default=2048, help="tokens in a packed row")
options = parser.parse_args()

trainer = SFTTrainer(
    model=options.model,
    args=SFTConfig(
        output_dir=options.output_dir,
        use_chronicals=True,
        use_cpu=not torch.accelerator.is_available(),  # TRL trains in bf16, and on a CPU wants that said
        learning_rate=5e-5,  # A's; LoRA+ gives B 16 times that
        packing=True,
        max_length=options.max_length,
        per_device_train_batch_size=4,
        # gradient_checkpointing is left at TRL's default, which is on: `recompute` then finds how many layers memory
        # needs computed again, where True, given here, would have all of them computed again.
        warmup_steps=0.03,
        num_train_epochs=1,
        max_steps=options.max_steps,
        save_strategy="no",
    ),
    train_dataset=load_dataset("json", data_files=options.data, split="train"),
    quantization_config=BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,  # the scales of the 4-bit blocks in 8 bits
        bnb_4bit_compute_dtype=torch.bfloat16,
    ),
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
)
trainer.train()
trainer.save_model()  # the adapter alone
trainer.accelerator.print(trainer.chronicals_report.render())

"""Chats that call tools: the model learns its own turns, calls included, and nothing of what the tools answered.

    python examples/tool_calling.py --model DIR_OR_NAME --data train.jsonl

A line of `--data` is {"messages": [...], "tools": [...]}: messages of the roles user, assistant and tool, calls in the
assistant's `tool_calls`, and the JSON schemas of the tools that this chat has:

    {"messages": [{"role": "user", "content": "Weather in Rome?"},
                  {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function":
                      {"name": "weather", "arguments": {"city": "Rome"}}}]},
                  {"role": "tool", "name": "weather", "content": "18 degrees"},
                  {"role": "assistant", "content": "18 degrees."}],
     "tools": [{"type": "function", "function": {"name": "weather", "parameters": {...}}}]}

The model's chat template has to know tools. `assistant_only_loss` wants it to mark the assistant's turns too
({% generation %}); TRL puts them into the templates that it knows (Qwen, Llama 3 and more), and says so where it
cannot.
"""

import argparse
import json
from pathlib import Path

import torch
from datasets import Dataset

from chronicals_trl import SFTConfig, SFTTrainer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", required=True)
parser.add_argument("--data", required=True)
parser.add_argument("--output_dir", default="outputs/tool-calling")
parser.add_argument("--max_steps", type=int, default=-1, help="-1: one epoch")
parser.add_argument("--max_length", type=int, default=4096, help="tokens in a packed row")
options = parser.parse_args()

rows = [json.loads(line) for line in Path(options.data).read_text("utf-8").splitlines() if line.strip()]
# "use_json" keeps each call's arguments as they are. A column of one type would give every call the arguments of all
# tools, with null for those that it does not have, and the model would learn to write them.
dataset = Dataset.from_list(rows, on_mixed_types="use_json")

trainer = SFTTrainer(
    model=options.model,
    args=SFTConfig(
        output_dir=options.output_dir,
        use_chronicals=True,
        use_cpu=not torch.accelerator.is_available(),  # TRL trains in bf16, and on a CPU wants that said
        packing=True,
        assistant_only_loss=True,
        max_length=options.max_length,
        per_device_train_batch_size=2,
        learning_rate=1e-5,
        num_train_epochs=1,
        max_steps=options.max_steps,
        save_strategy="no",
    ),
    train_dataset=dataset,
)
trainer.train()
trainer.save_model()
trainer.accelerator.print(trainer.chronicals_report.render())

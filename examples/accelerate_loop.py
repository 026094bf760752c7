"""A training loop of one's own, with Accelerate and without a Trainer.

    accelerate launch examples/accelerate_loop.py --model DIR_OR_NAME --data train.jsonl

`--data` is a JSON Lines file of {"text": ...}. Two things in it are chronicals-trl's: `ChronicalsAccelerator` in place
of `Accelerator`, which patches the models that pass through `prepare`, and `fused_lm_head=True`, which takes the loss
without building the logits. `model(**batch).loss` goes on working as it is, and CHRONICALS_USE_CHRONICALS=0 in the
environment makes the loop a stock one. On several GPUs add a file of integrations/accelerate to the command, such as
`--config_file integrations/accelerate/fsdp2.yaml`. A batch counts as much as any other there, however many tokens it
has.
"""

import argparse

import torch
from accelerate.utils import set_seed
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling

from chronicals_trl import ChronicalsAccelerator

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", required=True)
parser.add_argument("--data", required=True)
parser.add_argument("--output_dir", default="outputs/accelerate-loop")
parser.add_argument("--max_steps", type=int, default=1000)
parser.add_argument("--max_length", type=int, default=512, help="longer texts are truncated")
parser.add_argument("--batch_size", type=int, default=4)
parser.add_argument("--learning_rate", type=float, default=2e-5)
options = parser.parse_args()

accelerator = ChronicalsAccelerator()
set_seed(0)

tokenizer = AutoTokenizer.from_pretrained(options.model)
if tokenizer.pad_token is None:
    tokenizer.pad_token = tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained(options.model)
optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate)

dataset = load_dataset("json", data_files=options.data, split="train")
if "text" not in dataset.column_names:
    parser.error(f'--data needs lines of {{"text": ...}}; {options.data} has {", ".join(dataset.column_names)}')
with accelerator.main_process_first():
    dataset = dataset.map(
        lambda rows: tokenizer(rows["text"], truncation=True, max_length=options.max_length),
        batched=True,
        remove_columns=dataset.column_names,
    )
loader = torch.utils.data.DataLoader(
    dataset,
    batch_size=options.batch_size,
    shuffle=True,
    collate_fn=DataCollatorForLanguageModeling(tokenizer, mlm=False),
)

# The model and its optimizer in one call: FSDP2 wants it so, and a LoRA model's optimizer gets LoRA+'s groups here.
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

model.train()
step = 0
while step < options.max_steps:
    for batch in loader:
        loss = model(**batch, fused_lm_head=True).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % 10 == 0 or step == options.max_steps:
            mean = accelerator.reduce(loss.detach(), "mean")
            accelerator.print(f"step {step}: loss {mean.item():.4f}")
        if step == options.max_steps:
            break

accelerator.wait_for_everyone()
accelerator.unwrap_model(model).save_pretrained(
    options.output_dir, is_main_process=accelerator.is_main_process, state_dict=accelerator.get_state_dict(model)
)

"""Supervised fine-tuning with TRL: an ordinary script, with nothing of chronicals-trl in it.

    accelerate launch -m chronicals_trl examples/sft.py --use_chronicals True --packing True \
        --model_name_or_path DIR_OR_NAME --dataset_name DIR_OR_NAME --output_dir out

Without `-m chronicals_trl` and the flag it is stock TRL. `--dataset_name` is anything that `load_dataset` takes, a
folder with train.jsonl (and test.jsonl, for `--eval_strategy`) included. Ctrl-C, or SIGTERM from a scheduler, ends the
run after the next logged step with a checkpoint in `--output_dir`; the same command again goes on from there.
"""

import os
import signal
import sys

from datasets import load_dataset
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import (
    ModelConfig,
    ScriptArguments,
    SFTConfig,
    SFTTrainer,
    TrlParser,
    get_peft_config,
    get_quantization_config,
)


class SaveOnSignal(TrainerCallback):
    """Ends training with a checkpoint when the process is interrupted; a second signal ends the process at once."""

    def __init__(self, accelerator):
        self.accelerator = accelerator
        self.interrupted = False
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self._request)

    def _request(self, signum, frame):
        signal.signal(signum, signal.SIG_DFL)
        self.accelerator.set_trigger()
        print("\nInterrupted: a checkpoint follows after the step in progress.", flush=True)

    def on_step_end(self, args, state, control, **kwargs):
        # The ranks have to agree on the step to stop at, which takes a collective: only where the trainer waits for
        # the device anyway.
        if state.global_step % state.logging_steps == 0 and self.accelerator.check_trigger():
            self.interrupted = True
            control.should_save = control.should_training_stop = True


def main(script_args, training_args, model_args):
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    dataset = load_dataset(
        script_args.dataset_name, name=script_args.dataset_config, streaming=script_args.dataset_streaming
    )
    trainer = SFTTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=dataset[script_args.dataset_train_split],
        eval_dataset=dataset[script_args.dataset_test_split] if training_args.eval_strategy != "no" else None,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    save_on_signal = SaveOnSignal(trainer.accelerator)
    trainer.add_callback(save_on_signal)

    checkpoint = training_args.resume_from_checkpoint
    if checkpoint is None and os.path.isdir(training_args.output_dir):
        # True: the last whole one, past any that a killed run has left half written.
        checkpoint = get_last_checkpoint(training_args.output_dir) is not None
    result = trainer.train(resume_from_checkpoint=checkpoint)
    if save_on_signal.interrupted:
        trainer.accelerator.print(
            f"Stopped after step {trainer.state.global_step} of {trainer.state.max_steps}, with a checkpoint in "
            f"{training_args.output_dir}. Run the same command again to go on from there."
        )
        sys.exit(130)  # what a shell expects of a command that Ctrl-C ended

    trainer.save_model()
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()


if __name__ == "__main__":
    main(*TrlParser((ScriptArguments, SFTConfig, ModelConfig)).parse_args_and_config())

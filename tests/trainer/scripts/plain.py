"""An ordinary TRL script: nothing of ours in it."""

import tiny
from trl import SFTConfig, SFTTrainer, TrlParser

if __name__ == "__main__":
    (training_args,) = TrlParser(SFTConfig).parse_args_and_config()
    tiny.train(SFTTrainer, training_args)

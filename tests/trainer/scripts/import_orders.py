"""Each order in which a program can import trl and us; one fork an order, so that the slow imports happen once."""

import os
import sys
import traceback

import datasets  # noqa: F401
import peft  # noqa: F401
import torch  # noqa: F401
import transformers

CHECK = """
import trl, trl.trainer, trl.trainer.sft_config, trl.trainer.sft_trainer, pickle, importlib
from chronicals_trl import SFTConfig, SFTTrainer
for place in (trl, trl.trainer, trl.trainer.sft_config):
    assert place.SFTConfig is SFTConfig, place
for place in (trl, trl.trainer, trl.trainer.sft_trainer):
    assert place.SFTTrainer is SFTTrainer, place
stock_config, stock_trainer = SFTConfig.__base__, SFTTrainer.__bases__[-1]
assert stock_config.__module__ == "trl.trainer.sft_config" and stock_trainer.__module__ == "trl.trainer.sft_trainer"
# The parent's own isinstance test must go on seeing the stock class.
assert trl.trainer.sft_trainer.__dict__["SFTConfig"] is stock_config
from trl.scripts import sft
parser = sft.make_parser()
assert SFTConfig in parser.dataclass_types
assert all("_Loader" not in type(m.__spec__.loader).__name__ for m in (trl, trl.trainer, SFTConfig_module))
""".replace("SFTConfig_module", "importlib.import_module('chronicals_trl.config')")

ORDERS = {
    "register first": "import chronicals_trl; chronicals_trl.register()",
    "trl first": "import trl, chronicals_trl; chronicals_trl.register()",
    "trl's names cached first": (
        "import trl; trl.SFTTrainer, trl.SFTConfig\nfrom trl import SFTTrainer\n"
        "import chronicals_trl; chronicals_trl.register()\n"
        "import trl.trainer.sft_trainer as t; assert t.SFTTrainer is not SFTTrainer"
    ),
    "submodule first": ("import trl.trainer.sft_config, chronicals_trl; chronicals_trl.register()"),
    "submodule after": (
        "import chronicals_trl; chronicals_trl.register()\n"
        "from trl.trainer.sft_trainer import SFTTrainer\n"
        "from trl.trainer.sft_config import SFTConfig\n"
        "assert SFTTrainer.__module__ == 'chronicals_trl.trainer'\n"
        "assert SFTConfig.__module__ == 'chronicals_trl.config'"
    ),
    "our config between register and trl": (
        "import chronicals_trl; chronicals_trl.register()\nfrom chronicals_trl.config import SFTConfig"
    ),
    "our trainer between register and trl": (
        "import chronicals_trl; chronicals_trl.register()\nfrom chronicals_trl import SFTTrainer"
    ),
    "the trainer's parts between register and trl": (
        "import chronicals_trl; chronicals_trl.register()\n"
        "import chronicals_trl.packing.trainer, chronicals_trl.optim.trainer"
    ),
    "our trainer before register": "from chronicals_trl import SFTTrainer, register; register()",
    "twice": (
        "import chronicals_trl; chronicals_trl.register(); chronicals_trl.register()\n"
        "import trl; chronicals_trl.register()"
    ),
    "unregister and again": (
        "import chronicals_trl; from chronicals_trl import _register\n"
        "chronicals_trl.register(); _register.unregister()\n"
        "import trl; assert trl.SFTTrainer.__module__ == 'trl.trainer.sft_trainer'\n"
        "chronicals_trl.register(); assert trl.SFTConfig.__module__ == 'chronicals_trl.config'\n"
        "_register.unregister()\n"
        "assert trl.SFTTrainer.__module__ == 'trl.trainer.sft_trainer'\n"
        "assert trl.trainer.sft_config.SFTConfig.__module__ == 'trl.trainer.sft_config'\n"
        "chronicals_trl.register()"
    ),
    "a stock config pickles after register": (
        "from trl import SFTConfig as Stock\n"
        "stock = Stock(output_dir='unused', use_cpu=True, bf16=False, report_to='none')\n"
        "import pickle, chronicals_trl; chronicals_trl.register()\n"
        "copy = pickle.loads(pickle.dumps(stock))\n"
        "assert type(copy) is Stock and copy.to_dict() == stock.to_dict()"
    ),
    "experimental trainers build on ours": (
        "import chronicals_trl; chronicals_trl.register()\n"
        "from trl.experimental.gkd import GKDConfig, GKDTrainer\n"
        "assert issubclass(GKDConfig, chronicals_trl.SFTConfig)\n"
        "assert issubclass(GKDTrainer, chronicals_trl.SFTTrainer)"
    ),
}


def main() -> int:
    # transformers loads these when they are first asked for: once here, not once in each fork.
    for name in ("Trainer", "AutoModelForCausalLM", "AutoProcessor"):
        getattr(transformers, name)
    failed = []
    for name, code in ORDERS.items():
        child = os.fork()
        if child == 0:
            try:
                exec(code + CHECK, {"__name__": "order"})
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        if os.waitpid(child, 0)[1] != 0:
            failed.append(name)
    print("failed:", failed)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

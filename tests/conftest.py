"""Settings that must be in force before torch or the hub's client are imported."""

from __future__ import annotations

import os

# Two xdist workers share two cores; more threads than cores make every small test slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# A developer's own settings would change what is tested.
for _name in [name for name in os.environ if name.startswith("CHRONICALS_")]:
    del os.environ[_name]

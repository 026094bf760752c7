"""Each way to attend within documents, run on a small packed row and compared with torch's attention by number.

What a run does when it chooses a back end for a model (`model.attention_choice`), here for all of them and for one
shape; and, for those that are not there or not right, why, and whether it matters.
"""

from __future__ import annotations

import importlib
import time

import torch

from chronicals_trl import _versions
from chronicals_trl.doctor.findings import Check, Problem, first_line
from chronicals_trl.model import attention_backends, attention_choice

#: Grouped-query attention with heads of the commonest size.
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 64

#: Back end to the distribution and the module that bring it.
_PACKAGES = {
    "fa4": ("flash-attn-4", "flash_attn.cute.interface", "_flash_attn_fwd"),
    "fa3": ("flash-attn-3", "flash_attn_interface", "flash_attn_varlen_func"),
    "fa2": ("flash-attn", "flash_attn", "flash_attn_varlen_func"),
}


def check_attention(device: torch.device) -> list[Check]:
    """One check for each back end, best first; the last is torch's attention with a mask, which runs anywhere."""
    checks = []
    for name, label in attention_choice.LABELS.items():
        start = time.perf_counter()
        backend = attention_backends.BACKENDS.get(name)
        detail = None if backend is None else attention_backends.unavailable(backend, device)
        if detail is not None:
            broken = None if " needs " in detail else _broken(name, detail)
            checks.append(Check(label, "failed" if broken else "not available", label, broken or detail))
            continue
        try:
            detail = attention_choice.verify_backend(
                name, heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM, window=None, device=device
            )
        except Exception as error:  # not even the inputs could be made: the GPU is full, most often
            detail = f"{type(error).__name__}: {first_line(error)}"
        seconds = round(time.perf_counter() - start, 3)
        checks.append(Check(label, "ok" if detail is None else "failed", label, detail, seconds))
    return checks


def _broken(name: str, reason: str) -> str | None:
    """What is wrong with what is installed, by the reason why it is not available; None if it is not installed.

    The back end says "not installed" of a package without the function that it needs, too, or without what that
    imports. flash-attn 2 and 4 share the name `flash_attn`, so a broken 2 makes a 4 that is not there look broken.
    """
    if name not in _PACKAGES:  # torch's own, which this torch lacks
        return reason
    distribution, module, function = _PACKAGES[name]
    version = _versions.installed(distribution)
    if version is None:
        return None if name == "fa4" or "not installed" in reason else reason
    label = f"{distribution} {version}"
    try:
        found = importlib.import_module(module)
    except Exception as error:  # built for another torch or CUDA, most often
        return f"{label} cannot be imported ({type(error).__name__}: {first_line(error)})"
    return f"{label}: {reason}" if hasattr(found, function) else f"{label} has no {module}.{function}"


def chosen(checks: list[Check]) -> str | None:
    """The back end that `attention_backend="auto"` would take for an ordinary model."""
    return next((check.name for check in checks if check.state == "ok"), None)


def attention_problems(checks: list[Check], device: torch.device) -> list[Problem]:
    """None right is fatal; one that is broken costs nothing while a better one works, and that is said."""
    best = chosen(checks)
    if best is None:
        details = "; ".join(f"{check.name}: {check.detail}" for check in checks if check.state == "failed")
        what = f"No attention back end gives the right numbers here ({details})"
        return [Problem(what, "Reinstall torch; if it goes on failing, report it with this text", fatal=True)]
    problems = []
    order = [check.name for check in checks]
    for check in checks:
        if check.state != "failed":
            continue
        matters = order.index(check.name) < order.index(best)
        effect = f"{best} is taken in its place" if matters else f"{best}, which is taken, does without it"
        what = f"The attention back end {check.name} does not work: {(check.detail or '').rstrip('. ')}; {effect}"
        problems.append(Problem(what, _remedy(check)))
    # A dense mask of tokens x tokens, where the GPU could do without.
    if best == "sdpa" and device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8 and not problems:
        what = "No varlen attention kernel works, so packed rows take torch's attention with a dense mask"
        problems.append(Problem(what, "Update torch, whose own varlen attention needs nothing else"))
    return problems


def _remedy(check: Check) -> str:
    detail = check.detail or ""
    distribution = next((d for d, _, _ in _PACKAGES.values() if detail.startswith(f"{d} ")), None)
    if distribution is None:
        return "Update torch; if it goes on failing, report it with this text"
    remove = f"or remove it: pip uninstall {distribution}"
    if "cannot be imported" in detail:
        cuda = f" and CUDA {torch.version.cuda}" if torch.version.cuda else ""
        return (
            f"It was built for another torch, CUDA or Python: rebuild it for torch {torch.__version__}{cuda}, {remove}"
        )
    return f"Update it: pip install -U {distribution}, {remove}"

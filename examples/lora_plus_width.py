"""LoRA+ against width: does the best ratio grow with it, and does a ratio above 1 save steps?

    OMP_NUM_THREADS=1 python examples/lora_plus_width.py

The model is that of the LoRA+ paper's analysis (Hayou, Ghosh and Yu 2024, arXiv 2402.12354): an MLP with one hidden
matrix of width x width, which carries the adapter. At each width a base is trained on one teacher network, and the
adapter on another that shares part of its units. Every pair of a rate and a ratio is trained for each seed, all at
once: what comes before the adapter is the same for all of them, and their A and B are rows of batched tensors.

With widths alone growing, the theory has A's rate fall as 1/width and B's stay, so the ratio grow as width. It demands
that A's output stays of the order that it has at the start. So two ratios are looked for at each width: the one with
the lowest loss, and the one at which A's output, trained at the best rate, has grown A_GROWTH-fold. The base is
trained in the parametrization that the theory is about (muP: entries of the readout are of the order of 1/width).

Written to docs/results: lora_plus_width_cpu.json, with every figure, and a plot of the same name. No GPU, no download.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Legend of the suffixes: N examples, D input size, O output size, W width, R rank, S settings (pairs of rates).
INPUTS, OUTPUTS, TEACHER_UNITS, SHARED_UNITS = 32, 8, 24, 12
RANK, SCALE = 16, 1.0  # lora_alpha = r
BATCH, TRAIN, HELD_OUT = 64, 8192, 256
BETAS, EPS = (0.9, 0.999), 1e-8
EVAL_EVERY = 10
A_GROWTH = 2.0
RATIOS = [2.0**k for k in range(-2, 9)]
# Of sqrt(rate of A x rate of B), which decides how fast their product moves and hardly depends on the ratio.
MEAN_RATES = [2.0 ** (k / 2) for k in range(-17, -7)]
WIDTHS = [64, 128, 256, 512, 1024]


@dataclass(frozen=True)
class Base:
    """The trained base network: relu(x W_in), relu(. W_hidden), . W_out; all frozen from here on."""

    w_in_DW: Tensor
    w_hidden_WW: Tensor
    w_out_WO: Tensor

    def before_adapter(self, x_ND: Tensor) -> Tensor:
        return torch.relu(x_ND @ self.w_in_DW)


def teachers(generator: torch.Generator) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(units, readout) of the teacher of the base and of the adapter's, which keeps SHARED_UNITS of its units."""
    units = torch.randn(INPUTS, 2 * TEACHER_UNITS - SHARED_UNITS, generator=generator) / math.sqrt(INPUTS)
    readout = torch.randn(units.shape[1], OUTPUTS, generator=generator) * math.sqrt(2 / TEACHER_UNITS)
    return (
        (units[:, :TEACHER_UNITS], readout[:TEACHER_UNITS]),
        (units[:, -TEACHER_UNITS:], readout[-TEACHER_UNITS:]),
    )


def answers(teacher: tuple[Tensor, Tensor], x_ND: Tensor) -> Tensor:
    units, readout = teacher
    y_NO = torch.relu(x_ND @ units * 2) @ readout
    return y_NO - y_NO.mean(0)


def pretrain(width: int, teacher: tuple[Tensor, Tensor], generator: torch.Generator, steps: int) -> tuple[Base, float]:
    """A base for `teacher` and its held-out loss; muP's rates for Adam, so that bases of all widths learn alike."""
    w_in = torch.randn(INPUTS, width, generator=generator) * math.sqrt(2 / INPUTS)
    w_hidden = torch.randn(width, width, generator=generator) * math.sqrt(2 / width)
    w_out = torch.randn(width, OUTPUTS, generator=generator) / width
    weights = [w.requires_grad_() for w in (w_in, w_hidden, w_out)]
    rates = (5e-3, 0.5 / width, 0.5 / width)
    optimizer = torch.optim.Adam([{"params": [w], "lr": lr} for w, lr in zip(weights, rates, strict=True)])
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    base = Base(*weights)

    def loss_on(count: int) -> Tensor:
        x = torch.randn(count, INPUTS, generator=generator)
        return F.mse_loss(torch.relu(base.before_adapter(x) @ w_hidden) @ w_out, answers(teacher, x))

    for _ in range(steps):
        optimizer.zero_grad()
        loss_on(128).backward()
        optimizer.step()
        decay.step()
    base = Base(*(w.detach() for w in weights))
    with torch.no_grad():
        return base, loss_on(HELD_OUT).item()


@dataclass(frozen=True)
class Task:
    """What the adapters learn from: inputs of the adapted layer, its output without an adapter, targets."""

    h_NW: Tensor
    z_NW: Tensor
    y_NO: Tensor

    def rows(self, index: Tensor | slice) -> Task:
        return Task(self.h_NW[index], self.z_NW[index], self.y_NO[index])


def make_task(base: Base, teacher: tuple[Tensor, Tensor], generator: torch.Generator, count: int) -> Task:
    x = torch.randn(count, INPUTS, generator=generator)
    h = base.before_adapter(x)
    return Task(h, h @ base.w_hidden_WW, answers(teacher, x))


def initial_a(width: int, generator: torch.Generator) -> Tensor:
    """A (R, W) as PEFT starts it: uniform within 1/sqrt(width). B starts at zero."""
    return (2 * torch.rand(RANK, width, generator=generator) - 1) / math.sqrt(width)


def a_output(task: Task, a_SRW: Tensor) -> Tensor:
    """(N, S, R): what A makes of the layer's input."""
    settings, rank, width = a_SRW.shape
    return (task.h_NW @ a_SRW.reshape(settings * rank, width).T).unflatten(1, (settings, rank))


def losses(task: Task, w_out_WO: Tensor, a_SRW: Tensor, b_SWR: Tensor) -> Tensor:
    """(S,): the mean squared error of each setting's adapter."""
    low_SNR = a_output(task, a_SRW).transpose(0, 1)
    z_SNW = torch.baddbmm(task.z_NW.expand(len(a_SRW), -1, -1), low_SNR, b_SWR.transpose(1, 2), alpha=SCALE)
    return (torch.relu(z_SNW) @ w_out_WO - task.y_NO).square().mean((1, 2))


def train_adapters(
    base: Base, train: Task, held_out: Task, a_RW: Tensor, rates_a: Tensor, rates_b: Tensor, batches: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Train one adapter a setting with Adam, A at rates_a (S,) and B at rates_b (S,), all from a_RW and a B of zero.

    Args:
        batches: (steps, BATCH) indices into `train`.

    Returns:
        (evaluations, S): held-out loss at the start and after each EVAL_EVERY steps, infinite where it diverged; A
        (S, R, W) and B (S, W, R).
    """
    settings, width = len(rates_a), a_RW.shape[1]
    a = a_RW.expand(settings, -1, -1).clone().requires_grad_()
    b = torch.zeros(settings, width, len(a_RW)).requires_grad_()
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in (a, b)]
    history = []
    for step, batch in enumerate(batches, start=1):
        if step % EVAL_EVERY == 1:
            with torch.no_grad():
                history.append(losses(held_out, base.w_out_WO, a, b))
        losses(train.rows(batch), base.w_out_WO, a, b).sum().backward()
        with torch.no_grad():
            for parameter, rates, (first, second) in zip((a, b), (rates_a, rates_b), moments, strict=True):
                first.lerp_(parameter.grad, 1 - BETAS[0])
                second.lerp_(parameter.grad.square(), 1 - BETAS[1])
                denominator = (second / (1 - BETAS[1] ** step)).sqrt_().add_(EPS)
                parameter -= rates[:, None, None] / (1 - BETAS[0] ** step) * first / denominator
                parameter.grad = None
    a, b = a.detach(), b.detach()
    history.append(losses(held_out, base.w_out_WO, a, b))
    return torch.stack(history).nan_to_num_(math.inf, math.inf), a, b


def run(width: int, seed: int, steps: int, pretrain_steps: int) -> dict[str, Any]:
    """One width and seed: held-out losses and how much A's output has grown, for every mean rate (M) and ratio (K)."""
    first, second = teachers(torch.Generator().manual_seed(seed))  # one task for all widths
    generator = torch.Generator().manual_seed(1000 * seed + width)
    base, base_loss = pretrain(width, first, generator, pretrain_steps)
    train, held_out = (make_task(base, second, generator, count) for count in (TRAIN, HELD_OUT))
    a_RW = initial_a(width, generator)
    batches = torch.randint(TRAIN, (steps, BATCH), generator=generator)
    means_MK, ratios_MK = torch.meshgrid(torch.tensor(MEAN_RATES), torch.tensor(RATIOS), indexing="ij")
    rates_a, rates_b = (means_MK / ratios_MK.sqrt()).flatten(), (means_MK * ratios_MK.sqrt()).flatten()
    at_start = a_output(held_out, a_RW[None]).square().mean().sqrt()
    losses_of, growths = [], []
    size = max(1, 2**20 // (BATCH * width))  # in pieces whose activations stay in the processor's cache
    for part_a, part_b in zip(rates_a.split(size), rates_b.split(size), strict=True):
        history, a, _ = train_adapters(base, train, held_out, a_RW, part_a, part_b, batches)
        losses_of.append(history)
        growths.append(a_output(held_out, a).square().mean((0, 2)).sqrt() / at_start)
    return {
        "width": width,
        "seed": seed,
        "base_loss": base_loss,
        "history_EMK": torch.cat(losses_of, dim=1).unflatten(1, means_MK.shape),
        "growth_MK": torch.cat(growths).unflatten(0, means_MK.shape),
    }


def best_over_rates(history_EMK: Tensor) -> tuple[Tensor, Tensor]:
    """(K,): each ratio's lowest last loss, as log of its share of the first, and the index of its mean rate."""
    share = (history_EMK[-1] / history_EMK[0]).log()
    return share.min(0)


def crossing(xs: list[float], ys: list[float], level: float) -> float | None:
    """Where y, falling with x, passes `level`, between the two grid points around it, both axes in logs."""
    for (x0, y0), (x1, y1) in pairwise(zip(xs, ys, strict=True)):
        if y0 >= level > y1:
            return x0 * (x1 / x0) ** (math.log(y0 / level) / math.log(y0 / y1))
    return None


def minimum(xs: list[float], ys: list[float]) -> float:
    """Where the parabola through the lowest y and its neighbours has its minimum, over log x."""
    i = min(range(len(ys)), key=ys.__getitem__)
    if i in (0, len(ys) - 1):
        return xs[i]
    left, middle, right = ys[i - 1 : i + 2]
    return xs[i] * (xs[i + 1] / xs[i]) ** (0.5 * (left - right) / (left - 2 * middle + right))


def steps_to(history_EMK: Tensor, share: float) -> list[float | None]:
    """For each ratio the steps of its fastest mean rate to this log share of the first loss, between evaluations."""
    shares = (history_EMK / history_EMK[0]).log()
    found: list[float | None] = []
    for k in range(shares.shape[2]):
        steps = []
        for curve in shares[:, :, k].T.tolist():
            at = next((e for e, value in enumerate(curve) if value <= share), None)
            if at is not None:
                steps.append(EVAL_EVERY * (at - (share - curve[at]) / (curve[at - 1] - curve[at])))
        found.append(min(steps, default=None))
    return found


def summarize_seed(cell: dict[str, Any]) -> dict[str, Any]:
    """One width and seed: each ratio at its best rates, and the ratios that were looked for.

    The halfway loss is the lowest that one rate for both matrices has after half of the steps.
    """
    share_K, at_K = best_over_rates(cell["history_EMK"])
    growth = cell["growth_MK"].gather(0, at_K[None])[0].tolist()
    single = RATIOS.index(1.0)
    history = cell["history_EMK"]
    halfway = (history[len(history) // 2] / history[0])[:, single].log().min().item()
    steps = steps_to(history, halfway)
    return {
        "width": cell["width"],
        "seed": cell["seed"],
        "base_loss": cell["base_loss"],
        "start_loss": cell["history_EMK"][0, 0, 0].item(),
        "ratio_of_lowest_loss": minimum(RATIOS, share_K.tolist()),
        "ratio_of_held_a": crossing(RATIOS, growth, A_GROWTH),
        "by_ratio": [
            {
                "ratio": ratio,
                "loss_over_start": math.exp(share_K[k]),
                "loss_over_single_rate": math.exp(share_K[k] - share_K[single]),
                "steps_to_halfway_loss": steps[k],
                "growth_of_a": growth[k],
                "mean_rate": MEAN_RATES[int(at_K[k])],
                "mean_rate_at_edge": int(at_K[k]) in (0, len(MEAN_RATES) - 1),
            }
            for k, ratio in enumerate(RATIOS)
        ],
    }


def mean_and_error(values: list[float]) -> dict[str, float]:
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return {"mean": statistics.mean(values), "standard_error": error}


def exponents(rows: list[dict[str, Any]], key: str) -> dict[str, Any]:
    """The exponent of width in `key`: each seed's least-squares slope in logs, their mean and its standard error."""
    slopes = []
    for seed in sorted({row["seed"] for row in rows}):
        points = [(row["width"], row[key]) for row in rows if row["seed"] == seed and row[key] is not None]
        if len(points) > 1:
            xs, ys = zip(*((math.log(x), math.log(y)) for x, y in points), strict=True)
            slopes.append(statistics.linear_regression(xs, ys).slope)
    return {**mean_and_error(slopes), "seeds": slopes} if slopes else {"seeds": []}


def summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Over the seeds: at each width the ratios that were looked for and the gain of each ratio, then the exponents."""
    widths = []
    for width in sorted({row["width"] for row in rows}):
        mine = [row for row in rows if row["width"] == width]
        entry: dict[str, Any] = {"width": width}
        for key in ("ratio_of_lowest_loss", "ratio_of_held_a"):
            logs = [math.log2(row[key]) for row in mine if row[key] is not None]
            entry[key] = 2 ** statistics.mean(logs) if logs else None
            entry[f"{key}_seeds"] = [row[key] for row in mine]
        entry["by_ratio"] = []
        for k, ratio in enumerate(RATIOS):
            each = [row["by_ratio"][k] for row in mine]
            got = [e["steps_to_halfway_loss"] for e in each if e["steps_to_halfway_loss"] is not None]
            entry["by_ratio"].append(
                {
                    "ratio": ratio,
                    "loss_over_start": statistics.geometric_mean(e["loss_over_start"] for e in each),
                    "loss_over_single_rate": mean_and_error([e["loss_over_single_rate"] for e in each]),
                    # Of the seeds that got there; how many did is beside it.
                    "steps_to_halfway_loss": mean_and_error(got) if got else None,
                    "seeds_that_got_there": len(got),
                    "growth_of_a": statistics.geometric_mean(e["growth_of_a"] for e in each),
                }
            )
        widths.append(entry)
    return {
        "widths": widths,
        "exponent_of_lowest_loss": exponents(rows, "ratio_of_lowest_loss"),
        "exponent_of_held_a": exponents(rows, "ratio_of_held_a"),
    }


def rounded(value: Any) -> Any:
    """To five digits, all the way down."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def plot(summary: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (losses_of, growths, best) = plt.subplots(1, 3, figsize=(14, 4))
    for index, entry in enumerate(summary["widths"]):
        color = plt.get_cmap("viridis")(index / max(1, len(summary["widths"]) - 1) * 0.9)
        each = entry["by_ratio"]
        gains = [e["loss_over_single_rate"] for e in each]
        losses_of.errorbar(
            RATIOS, [g["mean"] for g in gains], [g["standard_error"] for g in gains],
            color=color, marker="o", markersize=3, label=f"width {entry['width']}",
        )  # fmt: skip
        growths.plot(RATIOS, [e["growth_of_a"] for e in each], color=color, marker="o", markersize=3)
    losses_of.set(ylabel="last loss over that of one rate for both", ylim=(0.9, 1.3))
    losses_of.axhline(1, color="gray", linewidth=0.8)
    losses_of.legend(fontsize=8)
    growths.axhline(A_GROWTH, color="gray", linewidth=0.8)
    growths.set(ylabel="size of A's output, end over start", yscale="log")
    for axis in (losses_of, growths):
        axis.set(xlabel="ratio (rate of B over rate of A), each at its best rate")
        axis.set_xscale("log", base=2)
    widths = [entry["width"] for entry in summary["widths"]]
    for key, label, marker in (
        ("ratio_of_held_a", f"A's output grows {A_GROWTH:g}-fold", "s"),
        ("ratio_of_lowest_loss", "lowest loss", "o"),
    ):
        exponent = summary[f"exponent_{key.removeprefix('ratio_')}"].get("mean", math.nan)
        values = [entry[key] for entry in summary["widths"]]
        best.plot(widths, values, marker=marker, label=f"{label}: width^{exponent:.2f}")
    best.set(xlabel="width", ylabel="ratio, geometric mean of the seeds")
    best.set_xscale("log", base=2)
    best.set_yscale("log", base=2)
    best.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=100, help="of the adapter, a multiple of 10")
    parser.add_argument("--pretrain_steps", type=int, default=300, help="of the base")
    parser.add_argument("--output", type=Path, default=Path("docs/results/lora_plus_width_cpu.json"))
    options = parser.parse_args()
    if options.steps < EVAL_EVERY or options.steps % EVAL_EVERY:
        parser.error(f"--steps must be a multiple of {EVAL_EVERY}, got {options.steps}")
    rows = []
    started = time.process_time()
    for width in options.widths:
        for seed in range(options.seeds):
            rows.append(summarize_seed(run(width, seed, options.steps, options.pretrain_steps)))
            row = rows[-1]
            held = "none" if row["ratio_of_held_a"] is None else f"{row['ratio_of_held_a']:.1f}"
            print(
                f"width {width:5d} seed {seed}: lowest loss at ratio {row['ratio_of_lowest_loss']:.1f}, "
                f"A's output held at {held} ({time.process_time() - started:.0f} s of processor time)",
                flush=True,
            )
    summary = summarize(rows)
    setup = {
        "steps": options.steps, "pretrain_steps": options.pretrain_steps, "rank": RANK, "scale": SCALE, "batch": BATCH,
        "mean_rates": MEAN_RATES, "ratios": RATIOS, "a_growth": A_GROWTH, "torch": torch.__version__,
        "processor_seconds": round(time.process_time() - started),
    }  # fmt: skip
    options.output.parent.mkdir(parents=True, exist_ok=True)
    figures = rounded({"setup": setup, **summary, "seeds": rows})
    options.output.write_text(json.dumps(figures, indent=1, allow_nan=False) + "\n")
    plot(summary, options.output.with_suffix(".png"))
    for key in ("exponent_of_lowest_loss", "exponent_of_held_a"):
        print(key, summary[key])


if __name__ == "__main__":
    main()

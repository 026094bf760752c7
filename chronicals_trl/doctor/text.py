"""Findings for people: the tables, and the paragraph that goes into an issue."""

from __future__ import annotations

import textwrap
from typing import Any

WIDTH = 110


def as_text(findings: dict[str, Any]) -> str:
    """Everything but the model's report, which prints itself, and the verdict."""
    lines = [f"chronicals-trl {findings['chronicals-trl']}, Python {findings['python']}, {findings['platform']}", ""]
    lines.append(f"{'package':<14}{'installed':<16}{'floor':<8}{'tested':<10}state")
    for name, package in findings["packages"].items():
        found = package["installed"] or "-"
        lines.append(f"{name:<14}{found:<16}{package['floor']:<8}{package['tested']:<10}{package['state']}")
    optional = [f"{name} {version or '-'}" for name, version in findings["optional"].items()]
    lines += ["", *_wrapped("optional: " + ", ".join(optional))]
    if "gpu" in findings:
        lines += ["", *_wrapped(f"GPU: {gpus_in_words(findings['gpu'])}")]
    if findings.get("environment"):
        lines += ["", *_wrapped("environment: " + ", ".join(f"{k}={v}" for k, v in findings["environment"].items()))]
    for title, key in (("attention, checked by number", "attention"), ("fused ops, checked by number", "kernels")):
        if key in findings:
            lines += ["", f"{title}:", *(_check_line(check) for check in findings[key])]
    return "\n".join(lines)


def _check_line(check: dict[str, Any]) -> str:
    seconds = "" if check["state"] == "not available" else f"{check['seconds']:.1f} s"
    detail = (check["detail"] or "").strip().splitlines()[:1]
    backend = "" if check["backend"] == check["name"] else check["backend"]  # attention's checks are of back ends
    line = f"  {check['name']:<30}{check['state']:<15}{backend:<8}{seconds:<7}{''.join(detail)}"
    return line.rstrip()


def gpus_in_words(gpu: dict[str, Any]) -> str:
    """Each kind of GPU once, with its count, memory and compute capability, and the driver."""
    driver = f"driver {gpu['driver']}" if gpu["driver"] else "no driver"
    if not gpu["devices"]:
        return f"none in use ({driver}, torch built for {'CUDA ' + gpu['cuda'] if gpu['cuda'] else 'the CPU'})"
    kinds: dict[str, int] = {}
    for device in gpu["devices"]:
        kind = f"{device['name']}, {device['memory_gib']} GiB, compute capability {device['capability']}"
        kinds[kind] = kinds.get(kind, 0) + 1
    named = "; ".join(f"{count} x {kind}" if count > 1 else kind for kind, count in kinds.items())
    return f"{named} ({driver}, torch built for CUDA {gpu['cuda']})"


def verdict(findings: dict[str, Any]) -> str:
    """One paragraph: what this machine is, whether chronicals can run on it, with what, and what is wrong."""
    versions = ", ".join(f"{name} {package['installed'] or '-'}" for name, package in findings["packages"].items())
    ours, on = findings["chronicals-trl"], findings["platform"]
    sentences = [f"chronicals-trl {ours} on {on}, Python {findings['python']}, {versions}"]
    if "gpu" in findings:
        sentences.append(f"GPU: {gpus_in_words(findings['gpu'])}")
    sentences.append("It can run here" if findings["can_run"] else "It cannot run here as it should")
    if "kernels" in findings:
        sentences.append(_checks_in_words(findings))
    model = findings.get("model", {})
    if "parts" in model:
        sentences.append(_model_in_words(model))
    problems = sorted(findings["problems"], key=lambda problem: not problem["fatal"])
    for number, problem in enumerate(problems, 1):
        sentences.append(f"({number}) {problem['what']}. {problem['remedy']}")
    if not problems:
        sentences.append("Nothing is wrong")
    return " ".join(f"{sentence}." for sentence in sentences)


def _checks_in_words(findings: dict[str, Any]) -> str:
    kernels, attention = findings["kernels"], findings["attention"]
    right = sum(check["state"] == "ok" for check in kernels)
    by_kernel = any(check["backend"] == "triton" for check in kernels)
    how = "Triton kernels" if by_kernel else "plain torch, without kernels"
    working = [check["name"] for check in attention if check["state"] == "ok"]
    backends = f"{working[0]} is the attention back end" if working else "no attention back end is right"
    others = f" ({', '.join(working[1:])} would work too)" if len(working) > 1 else ""
    return f"{right} of {len(kernels)} fused ops agree with torch ({how}); {backends}{others}"


def _model_in_words(model: dict[str, Any]) -> str:
    on = [part["name"] for part in model["parts"] if part["state"] == "on"]
    off = [part for part in model["parts"] if part["state"] == "off"]
    text = f"For {model['name']} on: {', '.join(on) or 'nothing'}"
    return text + "".join(f"; {part['name']} off ({(part['reason'] or '').rstrip('.')})" for part in off)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def wrapped(text: str) -> str:
    """`text` in lines of at most `WIDTH`."""
    return "\n".join(textwrap.wrap(text, WIDTH, break_long_words=False, break_on_hyphens=False))

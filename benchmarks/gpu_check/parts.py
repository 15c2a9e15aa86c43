"""The parts of the check. Each measures one thing and says whether it is as it must be.

What two scorings may differ by are the library's own tolerances: `ScoringConfig.tolerance` where
one engine is compared with itself, `ParityConfig.allowed` where two computations are.
"""

from collections.abc import Callable
from dataclasses import asdict
from statistics import median
from typing import Any

from benchmarks.gpu_check.lab import SIDE_BY_SIDE, Difference, Dtype, Lab, difference
from benchmarks.gpu_check.processes import ElsewhereError, elsewhere
from benchmarks.gpu_check.work import Pass, describe_machine, make_adapter
from pipeline.plan import ParityConfig, ScoringConfig

Figures = dict[str, Any]
"""`passed`, `summary` (one line for people) and the numbers."""


class NotRun(Exception):
    """Why a part cannot be measured here."""


def environment(lab: Lab) -> Figures:
    """What all other numbers are true of."""
    config = lab.config("vllm", lab.dtypes[0])
    machine = elsewhere({}, describe_machine, config, lab.checkpoint)
    packages = ", ".join(f"{k} {v}" for k, v in machine["versions"].items() if v and "ll" in k)
    where = machine.get("gpu", f"CPU, {machine['cpus']} cores")
    summary = f"{where}; {packages}, torch {machine['versions']['torch']}; {machine['runner']}"
    return {"passed": True, "summary": summary, **machine}


def v2_path(lab: Lab) -> Figures:
    """Exact ids on the V2 runner against whole prompts on the V1 runner."""
    _needs_cuda(lab, "the V2 model runner needs Triton on a CUDA device")
    by_dtype, worst = {}, []
    for dtype in lab.dtypes:
        exact = lab.scored("vllm", dtype)
        # Read by vLLM when it starts, hence in a process of its own.
        flat = lab.scored("vllm", dtype, "flat", environment={"VLLM_USE_V2_MODEL_RUNNER": "0"})
        apart, allowed = _apart(exact, flat), ScoringConfig().tolerance(dtype)
        n_rows = sum(len(values) for values in exact.logprobs.values())
        by_dtype[dtype] = {
            "passed": exact.numerics.runner.startswith("v2 exact_ids")
            and flat.numerics.runner.startswith("v1 flat")
            and n_rows == lab.n_scored
            and apart.sequence_max <= allowed,
            "runners": [exact.numerics.runner, flat.numerics.runner],
            "n_rows": n_rows,
            "n_rows_wanted": lab.n_scored,
            "allowed": allowed,
            "exact_ids_against_flat": asdict(apart),
        }
        worst.append(f"{dtype}: {apart}, {allowed:g} allowed")
    return _by_dtype(by_dtype, "exact ids against flat: " + "; ".join(worst))


def parity(lab: Lab) -> Figures:
    """The two engines against each other; an untrained model must be far from both."""
    reference, untrained = lab.scored("torch", "float32"), lab.untrained()
    by_dtype, said = {}, []
    for dtype in lab.dtypes:
        allowed = ParityConfig(engine="torch").allowed(dtype)
        vllm, same = lab.scored("vllm", dtype), lab.scored("torch", dtype)
        apart, control = _apart(vllm, reference), _apart(vllm, untrained)
        by_dtype[dtype] = {
            "passed": apart.sequence_max <= allowed and _fails(control, allowed),
            "allowed": allowed,
            "vllm_against_torch_float32": asdict(apart),
            "vllm_against_torch_same_dtype": asdict(_apart(vllm, same)),
            "torch_same_dtype_against_torch_float32": asdict(_apart(same, reference)),
            "control": {"failed_as_it_must": _fails(control, allowed), **asdict(control)},
        }
        said.append(f"{dtype}: {apart}, {allowed:g} allowed, control {control.sequence_mean:.0f}")
    return _by_dtype(by_dtype, "vLLM against torch float32: " + "; ".join(said))


def null_test(lab: Lab) -> Figures:
    """The null test of a scoring pass: the same twice, and once in other batches."""
    by_dtype, said = {}, []
    for dtype in lab.dtypes:
        outcome = lab.scored("vllm", dtype).null_test
        by_dtype[dtype] = {"passed": outcome.passed, **outcome.to_dict()}
        said.append(f"{dtype}: repeat {outcome.repeat:.1e}, floor {outcome.noise_floor:.1e}")
    return _by_dtype(by_dtype, "; ".join(said))


def prefix_reuse(lab: Lab) -> Figures:
    """A prompt computed once for both completions, against twice: the numbers and the time."""
    dtype = lab.dtypes[0]
    share = {"gpu_memory_utilization": SIDE_BY_SIDE}
    race = lab.race(
        {
            "on": lab.config("vllm", dtype, prefix_reuse=True, **share),
            "off": lab.config("vllm", dtype, prefix_reuse=False, **share),
        }
    )
    apart = difference(race.logprobs["on"], race.logprobs["off"])
    allowed, ratio = ScoringConfig().tolerance(dtype), race.ratio("off", "on")
    return {
        "passed": apart.sequence_max <= allowed,
        "summary": f"{dtype}: on against off {apart}, {allowed:g} allowed; "
        f"off takes {_times(ratio)}",
        "dtype": dtype,
        "allowed": allowed,
        "on_against_off": asdict(apart),
        "times_as_long": ratio,
        "seconds": race.seconds,
        "calls_per_turn": race.calls,
    }


def throughput(lab: Lab) -> Figures:
    """Tokens per second, prompts counted with every completion, of vLLM and the torch engine."""
    dtype = lab.dtypes[0]
    race = lab.race(
        {
            "vllm": lab.config("vllm", dtype, gpu_memory_utilization=SIDE_BY_SIDE),
            "torch": lab.config("torch", dtype),
        }
    )
    rates = {name: lab.n_tokens / median(seconds) for name, seconds in race.seconds.items()}
    ratio = race.ratio("torch", "vllm")
    said = ", ".join(f"{name} {rate:,.0f}" for name, rate in rates.items())
    return {
        "passed": True,  # how fast it must be depends on the machine
        "summary": f"{dtype}, tokens/s: {said}; torch takes {_times(ratio)}",
        "dtype": dtype,
        "tokens_per_second": rates,
        "times_as_long": ratio,
        "tokens_per_call": lab.n_tokens,
        "seconds": race.seconds,
        "calls_per_turn": race.calls,
    }


def lora(lab: Lab) -> Figures:
    """An adapter that vLLM applies against the same one merged; without it, far from both."""
    dtype = lab.sharpest
    with_adapter, merged = elsewhere({}, make_adapter, lab.checkpoint, lab.root / "lora")
    applied = lab.scored("vllm", dtype, "adapter", with_adapter)
    apart = _apart(applied, lab.scored("vllm", dtype, "merged", merged))
    control = _apart(applied, lab.scored("vllm", dtype))
    allowed = ParityConfig(engine="torch").allowed(dtype)
    return {
        "passed": apart.sequence_max <= allowed and _fails(control, allowed),
        "summary": f"{dtype}: applied against merged {apart}, {allowed:g} allowed, control "
        f"{control.sequence_mean:.0f}",
        "dtype": dtype,
        "allowed": allowed,
        "applied_against_merged": asdict(apart),
        "control": {"failed_as_it_must": _fails(control, allowed), **asdict(control)},
    }


def batch_invariant(lab: Lab) -> Figures:
    """The noise floor with vLLM's batch-invariant kernels, which should be 0."""
    _needs_cuda(lab, "VLLM_BATCH_INVARIANT has no effect without a CUDA device")
    dtype = lab.dtypes[0]
    without = lab.scored("vllm", dtype).null_test
    try:
        switched = lab.scored("vllm", dtype, "invariant", environment={"VLLM_BATCH_INVARIANT": "1"})
    except ElsewhereError as error:  # it is beta, and not for every device and model
        raise NotRun(f"vLLM does not work with VLLM_BATCH_INVARIANT=1: {error}") from error
    outcome = switched.null_test
    return {
        "passed": switched.numerics.batch_invariant
        and outcome.repeat <= without.repeat
        and outcome.noise_floor <= without.noise_floor,
        "summary": f"{dtype}: floor {outcome.noise_floor:.1e} with it, "
        f"{without.noise_floor:.1e} without",
        "dtype": dtype,
        "exact": outcome.repeat == outcome.noise_floor == 0.0,
        "with_it": outcome.to_dict(),
        "without": without.to_dict(),
    }


PARTS: dict[str, Callable[[Lab], Figures]] = {
    "environment": environment,
    "v2_path": v2_path,
    "parity": parity,
    "null_test": null_test,
    "prefix_reuse": prefix_reuse,
    "throughput": throughput,
    "lora": lora,
    "batch_invariant": batch_invariant,
}
"""In the order in which they are run and printed."""


def _needs_cuda(lab: Lab, why: str) -> None:
    if not lab.on_cuda:
        raise NotRun(why)


def _apart(first: Pass, second: Pass) -> Difference:
    return difference(first.logprobs, second.logprobs)


def _fails(control: Difference, allowed: float) -> bool:
    """Whether a control is far off, not just in its worst sequence."""
    return control.sequence_mean > max(1.0, allowed)


def _by_dtype(by_dtype: dict[Dtype, Figures], summary: str) -> Figures:
    passed = all(figures["passed"] for figures in by_dtype.values())
    return {"passed": passed, "summary": summary, "by_dtype": by_dtype}


def _times(ratio: dict[str, Any]) -> str:
    return f"{ratio['median']:.2f} ({ratio['least']:.2f} to {ratio['most']:.2f}) times as long"

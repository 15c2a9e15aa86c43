"""Training on a GPU: run by `pytest -m gpu tests/training/run/test_gpu.py`.

What the CPU trains in float32, to within rounding; half precision near it; checkpoints, the gate,
torchrun and the exported policy.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from scoring.oracle import random_groups, sample_groups
from support import PROJECT, measured, prepared
from transformers import AutoModelForCausalLM

from pipeline.errors import TrainingError
from pipeline.models import Checkpoint
from pipeline.names import key_of
from pipeline.plan import ModelConfig, TrainingConfig
from pipeline.scoring.engines.base import Group
from pipeline.scoring.ledger import read_logprobs
from pipeline.stages import score, train
from pipeline.store import Store, read
from pipeline.training.objective import Prepared, prepare
from pipeline.training.policy import load_policy
from pipeline.training.ranks.start import train_in_processes
from pipeline.training.run.loop import Run
from pipeline.training.run.model import trainable_model
from pipeline.training.run.replicas import Replicas
from pipeline.training.run.step import Work, run_step
from training.run.devices_runs import Asked, Ran, Weights, apart, asked, farthest, on_the_cpu, ran

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

LOSS, UPDATE = 1e-4, 2e-3
"""Nats, and of the update's norm: float32 on a GPU from float32 on a CPU."""
TINY: dict[str, Any] = {"max_steps": 10, "epochs": 4.0, "batch_pairs": 4}
LORA: dict[str, Any] = {**TINY, "learning_rate": 4e-3}
FULL: dict[str, Any] = {**TINY, "method": "full", "learning_rate": 4e-4}
DPO: dict[str, Any] = {"loss": "dpo", "beta": 0.1}
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dpo, lora": (DPO, LORA),
    "dpo, full": (DPO, FULL),
    "kto, full": ({"loss": "kto", "beta": 0.1}, FULL),
    "aot, lora": ({"loss": "aot", "beta": 0.1}, LORA),
    "simpo, lora": ({"loss": "simpo", "beta": 2.0, "gamma": 1.0}, LORA),
}
REAL: dict[str, dict[str, Any]] = {
    "packaged, lora": {"learning_rate": 2e-4, "max_steps": 3, "batch_pairs": 2},
    "packaged, full": {
        "method": "full", "learning_rate": 2e-6, "max_steps": 2, "batch_pairs": 2,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def pairs() -> list[Group]:
    return random_groups(3, 12)


@pytest.fixture(scope="module")
def real_pairs(packaged_model: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> list[Group]:
    """Six pairs of the sample, of its shorter half, for the CPU trains on them too."""
    store = Store(tmp_path_factory.mktemp("sample"), "test")
    groups = sample_groups(packaged_model, store, 1 << 20)
    of_two = [group for group in groups if len(group.completions) == 2]
    half = of_two[len(of_two) // 2 :]
    return half[:: len(half) // 6][:6]


@pytest.fixture(scope="module")
def work(
    tiny_model: Path, packaged_model: Checkpoint, pairs: list[Group], real_pairs: list[Group]
) -> dict[str, Asked]:
    """What is trained, with references of this GPU."""
    made = {
        name: asked(tiny_model, pairs, objective, **training)
        for name, (objective, training) in KINDS.items()
    }
    made |= {
        name: asked(packaged_model.path, real_pairs, DPO, **training)
        for name, training in REAL.items()
    }
    return made


@pytest.fixture(scope="module")
def on_cpu(work: dict[str, Asked], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ran]:
    """The same, trained by a process that sees no GPU."""
    found = on_the_cpu(list(work.values()), tmp_path_factory.mktemp("cpu"))
    return dict(zip(work, found, strict=True))


# (a) The CPU's training


@pytest.mark.parametrize("name", [*KINDS, *REAL])
def test_float32_trains_what_the_cpu_trains(
    name: str, work: dict[str, Asked], on_cpu: dict[str, Ran], tmp_path: Path
) -> None:
    assert torch.cuda.is_available(), "these tests are asked for with -m gpu, and need one"
    one, expected = work[name], on_cpu[name]
    found = ran(one, tmp_path / "it", require_on_gpu)
    wrong = ran(one.but(beta=1.5 * one.objective.values["beta"]), tmp_path / "wrong")
    far, off = farthest(found.losses, expected.losses), apart(found.update, expected.update)
    control = farthest(wrong.losses, expected.losses)
    moved = max(abs(loss - expected.losses[0]) for loss in expected.losses)
    measured(
        f"{name}: losses within {far:.1e} of the CPU's, which move by {moved:.2g}; update "
        f"{off:.1e} off; another beta (control) {control:.1e}, "
        f"{apart(wrong.update, expected.update):.1e}"
    )
    assert far <= LOSS
    assert off <= UPDATE
    assert found.first_difference <= 1e-3
    assert control > LOSS, "the control must fail"


def require_on_gpu(run: Run) -> Callable[[], None]:
    assert all(p.device.type == "cuda" for p in run._named.values())
    return lambda: None


# (b) Half precision


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_half_precision_trains_near_float32(
    packaged_model: Checkpoint,
    real_pairs: list[Group],
    tmp_path: Path,
    dtype: str,
    method: str,
) -> None:
    rate = 2e-4 if method == "lora" else 5e-6
    schedule: dict[str, Any] = {
        "schedule": "constant",
        "warmup_share": 0.0,
        "epochs": 4.0,
        "max_steps": 8,
    }
    one = asked(
        packaged_model.path, real_pairs, DPO, method=method, learning_rate=rate, batch_pairs=3,
        **schedule,
    )  # fmt: skip
    exact = ran(one, tmp_path / "exact")
    half = ran(one.but(dtype), tmp_path / "half", require_float32)
    # The first alone is of the same weights; from then on a skipped step is one behind.
    far, off = abs(half.losses[0] - exact.losses[0]), apart(half.update, exact.update)
    skipped = half.norms.count(0.0)
    first, last = (sum(half.losses[i : i + 2]) / 2 for i in (0, 6))
    measured(
        f"{dtype}, {method}: losses {first:.4f} to {last:.4f}, the first {far:.1e} from float32's; "
        f"update {off:.2f} off; first step {half.first_difference:.1e} nats from the tables; "
        f"{skipped} steps skipped"
    )
    assert all(norm < float("inf") for norm in half.norms)
    assert skipped <= (3 if dtype == "float16" else 0), "until the loss scale is low enough"
    assert last < first
    assert far < 0.1
    assert off < 0.5, "no update at all is 1 off"


def require_float32(run: Run) -> Callable[[], None]:
    """What is trained and its moments, after every step."""

    def look() -> None:
        kept = [*run._named.values()]
        kept += [run._optimiser.state[p][m] for p in run._named.values() for m in MOMENTS]
        assert {x.dtype for x in kept} == {torch.float32}
        assert all(bool(x.isfinite().all()) for x in kept)

    return look


MOMENTS = ("exp_avg", "exp_avg_sq")


def test_an_overflow_in_float16_is_skipped_and_on_record(
    work: dict[str, Asked], tmp_path: Path
) -> None:
    seen: list[Weights] = []
    scales: list[float] = []

    def watch(run: Run) -> Callable[[], None]:
        run._devices.load_scale({**run._devices.scale_state(), "scale": 2.0**10})

        def look() -> None:
            state = run._devices.scale_state()
            seen.append({n: p.detach().clone() for n, p in run._named.items()})
            scales.append(state["scale"])
            if len(seen) == 2:  # far more than half precision holds
                run._devices.load_scale({**state, "scale": 2.0**60})
            if len(seen) == 3:
                run._devices.load_scale({**state, "scale": 2.0**10})

        return look

    found = ran(work["dpo, full"].but("float16"), tmp_path, watch)
    assert scales[1:4] == [2.0**10, 2.0**59, 2.0**10], "halved, and set back"
    assert found.norms[2] == 0.0
    assert all(norm > 0 for i, norm in enumerate(found.norms) if i != 2)
    changed = [not all(torch.equal(a[n], b[n]) for n in a) for a, b in pairwise(seen)]
    assert [i + 2 for i, differs in enumerate(changed) if not differs] == [3], "step 3 alone"


# (c) Checkpoints


class Stopped(Exception):
    """In the middle of training."""


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("dpo, lora", "float32"), ("dpo, full", "bfloat16"), ("dpo, full", "float16")],
)
def test_training_goes_on_from_a_checkpoint(
    name: str, dtype: str, work: dict[str, Asked], tmp_path: Path
) -> None:
    one = work[name].but(dtype, checkpoint_every=1)
    scales: dict[str, list[float]] = {"whole": [], "resumed": []}

    def watch(which: str, stop: int, run: Run) -> Callable[[], None]:
        def look() -> None:
            scales[which].append(run._devices.scale_state().get("scale", 1.0))
            if run._standing.step == stop:
                raise Stopped

        return look

    whole = ran(one, tmp_path / "whole", partial(watch, "whole", 99))
    again = ran(one, tmp_path / "again")
    with pytest.raises(Stopped):
        ran(one, tmp_path / "resumed", partial(watch, "resumed", 5))
    resumed = ran(one, tmp_path / "resumed", partial(watch, "resumed", 99))
    noise, off = apart(again.update, whole.update), apart(resumed.update, whole.update)
    forgot = ran(one.but(dtype, max_steps=9), tmp_path / "control")
    control = apart(forgot.update, whole.update)
    measured(
        f"{name}, {dtype}: two runs {noise:.1e} of the update apart, one resumed {off:.1e}; a "
        f"step less (control) {control:.1e}"
    )
    assert len(resumed.losses) == len(whole.losses) == 10
    assert scales["resumed"] == scales["whole"]
    assert off <= (0.0 if noise == 0.0 else max(UPDATE, 3 * noise))
    assert control > max(UPDATE, 3 * off)


# (d) Gradient checkpointing


def test_checkpointed_layers_take_less_memory_and_give_the_same_gradients(
    packaged_model: Checkpoint, real_pairs: list[Group]
) -> None:
    one = asked(packaged_model.path, real_pairs, DPO)
    gradients: list[Weights] = []
    peaks: list[float] = []
    for checkpointing in (False, True):
        config = TrainingConfig(method="full", gradient_checkpointing=checkpointing)
        numerics = ModelConfig(checkpoint=str(one.checkpoint), engine="torch")
        model = trainable_model(Checkpoint(one.checkpoint), numerics, config, torch.device("cuda"))
        with Replicas(model) as replicas:
            assert replicas.packs_examples
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            step = Work(one.examples, 1, range(len(one.examples)), {})
            run_step(replicas, step, one.objective, 8192, lambda *_: None)
            peaks.append((torch.cuda.max_memory_allocated() - before) / 2**20)
        gradients.append(
            {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}
        )
        del model, replicas
        torch.cuda.empty_cache()
    off = apart(gradients[1], gradients[0])
    fewer = Work(one.examples[:-1], 1, range(len(one.examples) - 1), {})
    control = apart(gradient_of(one, fewer), gradients[0])
    measured(
        f"checkpointed layers: {peaks[1]:.0f} MiB instead of {peaks[0]:.0f}, gradients {off:.1e} "
        f"off; a pair less (control) {control:.2f}"
    )
    assert off < 1e-4
    assert control > 1e-2
    assert peaks[1] < 0.8 * peaks[0]


def gradient_of(one: Asked, step: Work) -> Weights:
    config = TrainingConfig(method="full")
    numerics = ModelConfig(checkpoint=str(one.checkpoint), engine="torch")
    model = trainable_model(Checkpoint(one.checkpoint), numerics, config, torch.device("cuda"))
    with Replicas(model) as replicas:
        run_step(replicas, step, one.objective, 8192, lambda *_: None)
    return {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}


def test_however_a_step_is_cut_its_gradient_is_the_same(work: dict[str, Asked]) -> None:
    one = work["dpo, full"]
    found = []
    for most in (1 << 20, 64):
        config = TrainingConfig(method="full")
        numerics = ModelConfig(checkpoint=str(one.checkpoint), engine="torch")
        model = trainable_model(Checkpoint(one.checkpoint), numerics, config, torch.device("cuda"))
        with Replicas(model) as replicas:
            step = Work(one.examples, 1, range(len(one.examples)), {})
            run_step(replicas, step, one.objective, most, lambda *_: None)
        found.append({n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None})
    assert apart(found[1], found[0]) < 1e-4


# (e, f, g) A plan


@pytest.fixture(scope="module")
def planned(
    packaged_model: Checkpoint, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Store, Prepared]:
    """A plan whose tables were scored on this GPU, in a process of its own."""
    import yaml

    root = tmp_path_factory.mktemp("planned")
    path = root / "plan.yaml"
    said = {
        "name": "gpu",
        "store": str(root / "store"),
        "sources": {"sample": {"path": str(PROJECT / "sample" / "preferences.jsonl")}},
        "limit_pairs": 12,
        "split": {"test_share": 0.0},
        "models": {"base": {"checkpoint": str(packaged_model.path), "engine": "torch"}},
        "objectives": {"dpo": {**DPO, "reference": "base", "start": "base"}},
        "training": {"max_steps": 3, "batch_pairs": 4, "learning_rate": 2e-4},
    }
    path.write_text(yaml.safe_dump(said))
    plan, store = prepared(path)
    ready = prepare(plan, store, "dpo")
    assert isinstance(ready, Prepared)
    return plan, store, ready


def test_torchrun_with_nccl_trains_what_one_process_does(
    planned: tuple[Any, Store, Prepared], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """World size 1: one GPU allows no more."""
    plan, store, ready = planned
    final = store.policies / ready.policy_id
    said = tmp_path / "said"
    (tmp_path / "watched.py").write_text(
        "import sys, torch\n"
        "from pathlib import Path\n"
        "from pipeline.training.ranks.rank import main\n"
        "from pipeline.training.run.devices import Devices\n"
        "real = Devices.__init__\n"
        "def made(self, *given, **named):\n"
        "    real(self, *given, **named)\n"
        "    total = torch.full((3,), 2.0, device=self.device)\n"
        "    torch.distributed.all_reduce(total)\n"
        "    gathered = [None]\n"
        "    torch.distributed.all_gather_object(gathered, [1.5, 'a'])\n"
        f"    Path({str(said)!r}).write_text(' '.join(map(str, [\n"
        "        torch.distributed.get_backend(), self.device, total.tolist(), gathered])))\n"
        "Devices.__init__ = made\n"
        "if __name__ == '__main__':\n    main(Path(sys.argv[1]))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    train_in_processes(plan, "dpo", ready.policy_id, ready.job.checkpoints, module="watched")
    by_torchrun = load_policy(final, trained=True)
    assert said.read_text() == "nccl cuda:0 [2.0, 2.0, 2.0] [[1.5, 'a']]"
    kept = final.rename(tmp_path / "by_torchrun")
    here = train(plan, store, "dpo")
    one, other = (load_adapter(at) for at in (kept, here.directory))
    off = apart(one, other)
    losses = farthest(by_torchrun.steps["loss"].to_list(), here.steps["loss"].to_list())
    measured(f"torchrun with nccl: adapter {off:.1e} off, losses {losses:.1e}")
    assert by_torchrun.policy_id == here.policy_id
    assert losses <= LOSS
    assert off <= UPDATE
    # A's first weights are large and the same; B begins as zeros.
    assert apart({n: w for n, w in one.items() if "lora_B" in n},
                 {n: w for n, w in other.items() if "lora_B" in n}) <= UPDATE  # fmt: skip


def load_adapter(directory: Path) -> Weights:
    from safetensors.torch import load_file

    return load_file(directory / "adapter_model.safetensors")


def test_an_exported_policy_loads_and_is_what_was_scored(
    planned: tuple[Any, Store, Prepared],
) -> None:
    from peft import PeftModel

    plan, store, _ = planned
    result = train(plan, store, "dpo")
    assert result.first_step.passed
    score(plan, store, "dpo")
    key, _ = key_of(plan, store, "dpo")
    held = dict(read_logprobs(key).select("sequence_id", "logprob").iter_rows())
    base = AutoModelForCausalLM.from_pretrained(
        plan.models["base"].checkpoint, dtype=torch.float64, attn_implementation="eager"
    )
    row = read(store, "sequences").sort("n_scored").row(-1, named=True)
    ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
    sums = []
    for model in (base, None):
        model = model or PeftModel.from_pretrained(base, result.directory).to(torch.float64)
        with torch.inference_mode():
            logprobs = torch.log_softmax(model(input_ids=ids).logits[0, :-1], -1)
        of_ids = logprobs.gather(1, ids[0, 1:, None])[row["n_prompt"] - 1 :, 0]
        spans = [of_ids[span["start"] : span["end"]].sum() for span in row["spans"]]
        sums.append(float(sum(spans)))
    off, control = (abs(held[row["sequence_id"]] - value) for value in reversed(sums))
    measured(
        f"exported policy: {off:.1e} nats from what was scored; its start (control) {control:.1e}; "
        f"first step {result.first_step.difference:.1e} from the tables"
    )
    assert off < 2e-3
    assert control > 10 * off, "the control must fail"


def test_the_gate_stops_a_reference_that_is_another(work: dict[str, Asked], tmp_path: Path) -> None:
    one = replace(work["packaged, lora"].but(max_steps=1), tolerance=1e-3)
    found = ran(one, tmp_path / "right")
    measured(f"first step: {found.first_difference:.1e} nats from the tables of the same GPU")
    assert found.first_difference <= 1e-3
    swapped = dict(one.table)
    for example in one.examples:
        chosen, rejected = (reply.sequence_id for reply in example.replies)
        swapped[chosen], swapped[rejected] = one.table[rejected], one.table[chosen]
    with pytest.raises(TrainingError, match=r"^step 1: .* differ from the start model's"):
        ran(replace(one, table=swapped), tmp_path / "wrong")

"""Two processes that share one model, against one that has all of it.

All trainings of a test are made by one start of torchrun, one after another.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support import build_tiny_model, measured
from transformers import AutoModelForCausalLM

from pipeline.errors import PlanError, TrainingError
from pipeline.plan import Plan, load_plan
from pipeline.scoring.engines.base import Sharing
from pipeline.scoring.engines.forward import Forward
from pipeline.stages import train
from pipeline.store import Store
from pipeline.training.objective import Prepared, prepare
from pipeline.training.policy import PolicyResult, load_policy
from pipeline.training.ranks.start import train_in_processes
from pipeline.training.run import loop
from training.run.runs import Desk, checkpoints, left_over, require_same, weights_of
from training.run.test_ranks import AT_STEP, FULL, LOSSES, by

SHARDED = ("training.processes=2", "training.fsdp=true")
LORA = ("training.method=lora", "training.lora.rank=4")
STARTS = {"": "base", "_tied": "tied"}
OBJECTIVES = {
    name + suffix: {"loss": name, "reference": start, "start": start, **values}
    for suffix, start in STARTS.items()
    for name, values in LOSSES.items()
}


@pytest.fixture
def desk(write_plan: Any, tmp_path: Path, tiny_model: Path) -> Desk:
    # 67 rows are not two equal halves.
    tied = build_tiny_model(tmp_path / "tied", 1, tie_word_embeddings=True, intermediate_size=67)
    models = {"base": {"checkpoint": str(tiny_model)}, "tied": {"checkpoint": str(tied)}}
    training = {**FULL, "epochs": 2}
    return Desk(write_plan, tmp_path, training=training, objectives=OBJECTIVES, models=models)


@dataclass
class Case:
    """A training: its objective, what its plan says beside the desk's, and code to run first."""

    objective: str = "dpo"
    overrides: tuple[str, ...] = ()
    code: str = ""
    place: tuple[Plan, Store] | None = None
    policy_id: str = ""
    sizes: list[dict[str, int]] = field(default_factory=list)
    """By process: the numbers of weights it holds, and of all there are."""

    def result(self) -> PolicyResult:
        assert self.place is not None
        return load_policy(self.place[1].policies / self.policy_id, trained=True)


_MANY = """
import json
import pytest
from pipeline.plan import Plan
from pipeline.training.ranks import rank
from pipeline.training.run import sharding, step
from torch.distributed.fsdp import FSDPModule
from pipeline.scoring.engines.base import Sharing
from pipeline.scoring.engines.forward import Forward

HERE = Path(__file__).parent
Devices.close = lambda self: None  # the processes are used again
train, begun = rank._train, loop.Run.__init__
sizes = []

class Stop(Exception):
    pass

def begin(run, job, devices, replicas, n_steps):
    begun(run, job, devices, replicas, n_steps)
    weights = list(replicas.model.parameters())
    held = sum(sharding.local(weight).numel() for weight in weights)
    sizes.append({"held": held, "all": sum(weight.numel() for weight in weights)})

loop.Run.__init__ = begin

def many(*_):
    for case in json.loads((HERE / "cases.json").read_text()):
        with pytest.MonkeyPatch.context() as patch:
            exec(case["code"], {**globals(), "patch": patch})
            try:
                train(Plan.model_validate(case["plan"]), case["objective"], case["policy_id"])
            except Stop:
                pass
    (HERE / f"sizes-{RANK}.json").write_text(json.dumps(sizes))

rank._train = many
"""

STOPPED = AT_STEP.format(rank="RANK", step=5, action="raise Stop").replace(
    "loop.Run.step = step", "patch.setattr(loop.Run, 'step', step)"
)
"""After the checkpoint of step 4."""


def two(desk: Desk, folder: Path, cases: list[Case], monkeypatch: pytest.MonkeyPatch) -> None:
    """Train by two processes that share a model."""
    asked = []
    for case in cases:
        case.place = case.place or desk.copy(*case.overrides)
        plan, store = case.place
        prepared = prepare(plan, store, case.objective)
        assert isinstance(prepared, Prepared)
        case.policy_id = prepared.policy_id
        processes = plan.training.model_copy(update={"processes": 2, "fsdp": True})
        said = plan.model_copy(update={"training": processes}).model_dump(mode="json")
        asked.append(
            {"plan": said, "objective": case.objective, "policy_id": case.policy_id}
            | {"code": case.code}
        )
    folder.mkdir()
    (folder / "cases.json").write_text(json.dumps(asked))
    with monkeypatch.context() as patched:
        by("many", patched, folder, _MANY)
        last = cases[-1]
        assert last.place is not None
        plan = last.place[0].model_copy(
            update={"training": last.place[0].training.model_copy(update={"processes": 2})}
        )
        train_in_processes(plan, last.objective, last.policy_id, folder, module="many")
    found = [json.loads((folder / f"sizes-{rank}.json").read_text()) for rank in (0, 1)]
    for case, sizes in zip(cases, zip(*found, strict=True), strict=True):
        case.sizes = list(sizes)


def tensors(result: PolicyResult) -> dict[str, torch.Tensor]:
    (file,) = result.directory.glob("*.safetensors")
    return load_file(file)


def update(desk: Desk, case: Case, result: PolicyResult) -> torch.Tensor:
    """What training added to the weights that it is about."""
    found = tensors(result)
    if "training.method=lora" in case.overrides:
        products = [
            found[name.replace("lora_A", "lora_B")] @ a
            for name, a in sorted(found.items())
            if "lora_A" in name
        ]
        return torch.cat([product.double().flatten() for product in products])
    start = desk.plan.models[desk.plan.objectives[case.objective].start].checkpoint
    before = load_file(Path(start) / "model.safetensors")
    return torch.cat([(found[name] - before[name]).double().flatten() for name in sorted(before)])


def off(desk: Desk, case: Case, one: PolicyResult, other: PolicyResult) -> float:
    expected = update(desk, case, one)
    return float((update(desk, case, other) - expected).norm() / expected.norm())


PLAIN = """
def plain(forward):
    forward._plain_attention = "eager"
    forward._set_attention("eager")
    return Sharing(False, "as some models are")
patch.setattr(Forward, "_find_out", plain)
"""

CASES = {
    "tied": Case("dpo_tied"),
    "kto": Case("kto_tied"),
    "aot": Case("aot"),
    "lora": Case("dpo_tied", LORA),
    "many parts": Case(
        "aot_tied", ("training.micro_batch_tokens=40", "training.gradient_checkpointing=true")
    ),
    "one layer, many parts": Case(
        "dpo",
        (
            *LORA,
            "training.lora.last_layers=1",
            "training.gradient_checkpointing=true",
            "training.micro_batch_tokens=40",
        ),
    ),
    "a pass each": Case("kto", code=PLAIN),
    "clipped": Case("dpo", ("training.max_grad_norm=0.5",)),
}


def difference(one: PolicyResult, other: PolicyResult, *columns: str) -> float:
    """The largest of all that is logged, or of some of it."""
    worst = 0.0
    for name in ("steps", "evaluations"):
        a, b = (getattr(result, name).drop("policy_id") for result in (one, other))
        assert a.shape == b.shape
        wanted = [column for column in a.columns if not columns or column in columns]
        for column in wanted:
            assert a[column].is_null().equals(b[column].is_null()), column
            worst = max(worst, float((a[column] - b[column]).fill_null(0).abs().max()))
    return worst


def test_two_that_share_a_model_train_what_one_does(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tied = AutoModelForCausalLM.from_pretrained(desk.plan.models["tied"].checkpoint)
    assert tied.get_input_embeddings().weight is tied.get_output_embeddings().weight
    ones = {name: _one(desk, case) for name, case in CASES.items()}
    averaged = Case(
        "dpo_tied", code="patch.setattr(FSDPModule, 'set_gradient_divide_factor', lambda *_: None)"
    )
    halved = Case(
        "dpo_tied",
        code="real = step.shares_of\n"
        "patch.setattr(step, 'shares_of', lambda of: [share * (1 - RANK) for share in real(of)])",
    )
    two(desk, tmp_path / "many", [*CASES.values(), averaged, halved], monkeypatch)
    far: dict[str, float] = {}
    logged: dict[str, float] = {}
    for name, case in CASES.items():
        one, result = ones[name], case.result()
        far[name], logged[name] = off(desk, case, one, result), difference(one, result)
        assert result.policy_id == one.policy_id, "how it is shared decides nothing"
        assert {k: v.shape for k, v in tensors(result).items()} == {
            k: v.shape for k, v in tensors(one).items()
        }
        files = {path.name for path in one.directory.iterdir()}
        assert {path.name for path in result.directory.iterdir()} == files
        for config in files & {"config.json", "adapter_config.json", "generation_config.json"}:
            assert _config(result, config) == _config(one, config)
        assert case.place is not None
        assert left_over(case.place[1]) == []
        assert case.sizes[0]["all"] == case.sizes[1]["all"] == sum(s["held"] for s in case.sizes)
        assert all(0.45 < s["held"] / s["all"] < 0.55 for s in case.sizes), case.sizes
    norm = averaged.result().steps["grad_norm"] / ones["tied"].steps["grad_norm"]
    means = norm.to_list()
    control = off(desk, halved, ones["tied"], halved.result())
    measured(
        f"off by {max(far.values()):.1e} of the update, by {max(logged.values()):.1e} in what is "
        f"logged; controls: averaged gradients have {max(means):.2f} of the norm, without one "
        f"process's part {control:.2f} of the update"
    )
    assert max(far.values()) <= 2e-3, far
    assert max(logged.values()) <= 1e-3, logged
    assert all(abs(mean - 0.5) < 0.01 for mean in means)
    assert control > 0.05
    assert ones["clipped"].steps["grad_norm"].min() > 0.5, "it was clipped"  # type: ignore[operator]
    for name in ("tied", "lora"):
        assert _next_token(desk, CASES[name], ones[name]) == _next_token(
            desk, CASES[name], CASES[name].result()
        )


def _one(desk: Desk, case: Case) -> PolicyResult:
    with pytest.MonkeyPatch.context() as patch:
        exec(case.code, {"patch": patch, "Sharing": Sharing, "Forward": Forward})
        return desk.trained(*case.overrides, objective=case.objective)


def _config(result: PolicyResult, name: str) -> dict[str, Any]:
    said: dict[str, Any] = json.loads((result.directory / name).read_text())
    return said | {"target_modules": sorted(said.get("target_modules", []))}  # PEFT's set


def _next_token(desk: Desk, case: Case, result: PolicyResult) -> list[float]:
    """As transformers and PEFT read the policy: some logits, to 3 digits."""
    if "training.method=lora" in case.overrides:
        start = desk.plan.models[desk.plan.objectives[case.objective].start].checkpoint
        base = AutoModelForCausalLM.from_pretrained(start)
        model = PeftModel.from_pretrained(base, result.directory)
    else:
        model = AutoModelForCausalLM.from_pretrained(result.directory)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[5, 6, 7]])).logits[0, -1, :20]
    return [round(x, 3) + 0.0 for x in logits.tolist()]


BEST = (*LORA, "training.keep_best=true", "training.evaluate_every=2")


@pytest.mark.parametrize(
    "overrides",
    [pytest.param((), id="full"), pytest.param(BEST, id="lora, the best", marks=pytest.mark.slow)],
)
def test_training_goes_on_however_the_model_is_held(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...]
) -> None:
    name = "dpo_tied"
    plain = train(*desk.copy(*overrides), name)
    # One process is stopped, and two go on with it.
    joined = Case(name, overrides, place=desk.copy(*overrides))
    assert joined.place is not None
    with monkeypatch.context() as patched:
        patched.setattr(loop.Run, "step", stopping)
        with pytest.raises(Stop):
            train(*joined.place, name)
    # Two are killed, and go on; two are stopped, and one goes on.
    killed = Case(name, overrides, place=desk.copy(*overrides, *SHARDED))
    assert killed.place is not None
    with monkeypatch.context() as patched:
        kill = AT_STEP.format(rank=1, step=5, action="os.kill(os.getpid(), signal.SIGKILL)")
        by("killed", patched, tmp_path, kill)
        with pytest.raises(TrainingError, match=r"^process 1 of 2 was ended by SIGKILL, after"):
            train(*killed.place, name)
    whole, parted = Case(name, overrides), Case(name, overrides, STOPPED)
    for begun in (joined, killed):
        assert begun.place is not None
        assert checkpoints(begun.place[1])[-1].name == "step-00000004"
    two(desk, tmp_path / "many", [whole, parted, killed, joined], monkeypatch)
    require_same(whole.result(), killed.result(), "to the bit")
    assert parted.place is not None
    assert checkpoints(parted.place[1])[-1].name == "step-00000004"
    results = {
        "two": whole.result(),
        "two, then one": train(*parted.place, name),
        "one, then two": joined.result(),
    }
    far = {how: off(desk, whole, plain, result) for how, result in results.items()}
    measured(f"off by {max(far.values()):.1e} of the update, however it is gone on with")
    assert max(far.values()) <= 2e-3, far
    assert {result.kept for result in results.values()} == {plain.kept}
    assert len({tuple(sorted(weights_of(result).items())) for result in results.values()}) > 1
    assert left_over(parted.place[1]) == []


class Stop(Exception):
    pass


def stopping(run: loop.Run, *arguments: Any, step: Any = loop.Run.step) -> Any:
    if run._standing.step == 5:
        raise Stop
    return step(run, *arguments)


def test_alone_it_is_nothing(desk: Desk) -> None:
    require_same(desk.trained(), desk.trained("training.fsdp=true"))


def test_what_cannot_be_shared_is_refused(desk: Desk) -> None:
    with pytest.raises(PlanError, match=r"training\.threads: with fsdp .* one copy"):
        load_plan(desk.path, [*SHARDED, "training.threads=2"])
    half = "models.tied.dtype=float16"
    with pytest.raises(PlanError, match=r"training\.fsdp: the start 'tied' is float16"):
        load_plan(desk.path, [*SHARDED, half])
    assert load_plan(desk.path, [half]).models["tied"].dtype == "float16"

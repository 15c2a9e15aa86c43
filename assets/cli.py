"""The command line.

`logratio run PLAN` runs a plan's job and says what came out; `logratio audit PAIRS --reference A
--policy B` does so for two models that are there already, without a plan. `logratio estimate PLAN`
says what a plan will cost; `logratio export PLAN OBJECTIVE DIRECTORY` writes a trained policy for
other programs; `logratio ledger ACTION STORE` looks after the log-probs of a store.
"""

import argparse
import os
import sys
from pathlib import Path
from time import monotonic

import dagster as dg

from assets.resources import resource_key
from assets.summary import beginning, summary
from assets.upkeep import add_ledger_command, look_after
from pipeline.errors import LogratioError
from pipeline.export.directory import export_policy
from pipeline.names import store_of
from pipeline.plan import Plan, load_plan, write_audit_plan

_DAGSTER_YAML = """\
telemetry:
  enabled: false
nux:
  enabled: false
python_logs:
  python_log_level: INFO
  managed_python_loggers: [pipeline]
"""


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and run it; 0 only if every step succeeded."""
    parser = argparse.ArgumentParser(prog="logratio", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run a plan from its sources to its reports")
    estimate = commands.add_parser("estimate", help="say what a plan will cost, and run nothing")
    export = commands.add_parser("export", help="write a policy as a directory to load elsewhere")
    for command in (run, estimate, export):
        command.add_argument("plan", type=Path, help="the plan's YAML file")
    export.add_argument("objective", help="whose policy")
    export.add_argument("directory", type=Path, help="a new one, which appears whole")
    form = export.add_mutually_exclusive_group()
    form.add_argument(
        "--merged",
        action="store_const",
        const="merged",
        dest="form",
        help="a model of its own, which transformers and vLLM load (the default)",
    )
    form.add_argument(
        "--adapter",
        action="store_const",
        const="adapter",
        dest="form",
        help="what PEFT and vLLM put over the start",
    )
    export.add_argument("--base", help="what the adapter calls its start; by default its hub id")
    export.set_defaults(form="merged")
    audit = commands.add_parser("audit", help="score pairs by two models and report the rewards")
    audit.add_argument("pairs", type=Path, help="a file of preference pairs, or a folder")
    audit.add_argument("--reference", required=True, help="a directory, hub id or packaged: name")
    audit.add_argument(
        "--policy", required=True, help="or a PEFT adapter, or a policy's current.json"
    )
    audit.add_argument("--store", type=Path, default=Path("store"), help="where the tables go")
    audit.add_argument("--name", help="of the audit's tables; by default made of the file's")
    audit.add_argument("--shape", help="of the pairs; found out by default")
    audit.add_argument("--dtype", default="float32", help="of both models")
    audit.add_argument("--engine", default="auto", help="auto, torch or vllm")
    add_ledger_command(commands)
    for command in (run, estimate, export, audit):
        command.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="KEY=VALUE",
            dest="overrides",
            help="change a value of the plan for this run, e.g. report.beta=0.2",
        )
    options = parser.parse_args(arguments)
    try:
        if options.command == "run":
            return run_plan(options.plan, options.overrides)
        if options.command == "estimate":
            print(beginning(load_plan(options.plan, options.overrides)))
            return 0
        if options.command == "export":
            print(_export(options))
            return 0
        if options.command == "ledger":
            lines, sound = look_after(
                options.action, options.store, getattr(options, "remove", False)
            )
            print("\n".join(lines))
            return 0 if sound else 1
        plan = write_audit_plan(
            options.pairs,
            options.reference,
            options.policy,
            store=options.store,
            name=options.name,
            shape=options.shape,
            numerics={"dtype": options.dtype, "engine": options.engine},
        )
        print(f"plan       {plan}")
        return run_plan(plan, options.overrides)
    except LogratioError as error:
        print(f"logratio: {error}", file=sys.stderr)
        return 2


def run_plan(path: Path, overrides: list[str]) -> int:
    """Run a plan's job in Dagster, so that its UI shows the run; prints a summary.

    Raises:
        pipeline.errors.PlanError: the plan or an override is wrong; nothing was run.
    """
    plan = load_plan(path, overrides)
    print(beginning(plan), flush=True)
    started = monotonic()
    with dg.DagsterInstance.from_config(str(prepare_home(plan))) as instance:
        result = dg.execute_job(
            dg.build_reconstructable_job(
                "assets.definitions", "reconstruct_job", (str(path.resolve()),)
            ),
            instance=instance,
            run_config={
                "resources": {
                    resource_key(plan.name): {
                        "config": {"path": str(path.resolve()), "overrides": overrides}
                    }
                },
                # Progress bars stay readable; everything is in the UI.
                "loggers": {"console": {"config": {"log_level": "WARNING"}}},
            },
            tags={".dagster/repository": "__repository__@logratio"},
        )
        print(summary(plan, result, monotonic() - started))
    return 0 if result.success else 1


def _export(options: argparse.Namespace) -> str:
    plan = load_plan(options.plan, options.overrides)
    done = export_policy(
        plan,
        store_of(plan),
        options.objective,
        options.directory,
        form=options.form,
        base=options.base,
    )
    what = f"an adapter over {done.start}" if done.needs_start else "a model of its own"
    return f"policy     {options.objective}: {what} is in {done.directory}"


def prepare_home(plan: Plan) -> Path:
    """Dagster's home: `DAGSTER_HOME`, or a folder in the plan's store, made when missing."""
    home = Path(os.environ.get("DAGSTER_HOME", plan.store / "dagster")).resolve()
    home.mkdir(parents=True, exist_ok=True)
    settings = home / "dagster.yaml"
    if not settings.exists():
        settings.write_text(_DAGSTER_YAML)
    return home


if __name__ == "__main__":
    sys.exit(main())

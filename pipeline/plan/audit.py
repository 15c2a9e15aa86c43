"""A plan for one question: what does this policy prefer, against that reference, on these pairs?"""

import json
import re
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import PlanError
from pipeline.sources import shape_of
from pipeline.sources.files import source_files

_TAKEN = ("reference", "policy")


def write_audit_plan(
    pairs: Path,
    reference: str,
    policy: str,
    *,
    store: Path,
    name: str | None = None,
    shape: str | None = None,
    numerics: dict[str, str] | None = None,
) -> Path:
    """Write the plan of an audit into its store, as `<store>/<plan>/plan.yaml`; returns its path.

    Nothing is held out by the audit and nothing trained on: all pairs are evaluation pairs. The
    plan names absolute paths, and can be edited and run again.

    Args:
        pairs: the file or folder of preference pairs.
        reference: a checkpoint: directory, hub id or `packaged:` name.
        policy: another; or the directory of a PEFT adapter, which goes over the reference; or the
            `current.json` of a policy that a plan has trained, which goes over its start if that is
            another policy.
        store: where the tables go.
        name: the plan's; by default made of the file's name.
        shape: of the pairs; found out by default.
        numerics: `dtype`, `engine` and the like of both models.

    Raises:
        PlanError: there are no pairs, a `.json` is no pointer to a policy, or the policy that one
            was trained from is gone.
        SourceError: no shape fits, or the folder holds no data files.
    """
    if not pairs.exists():
        raise PlanError(f"{pairs}: no such file or folder")
    plan = name or f"audit_{_slug(pairs.name.partition('.')[0])}"
    model = {"checkpoint": _located(reference), **(numerics or {})}
    audit = _slug(Path(policy).name if Path(policy).exists() else policy)
    if (pointer := Path(policy)).suffix == ".json" and pointer.is_file():
        audit, policy = _slug(pointer.parent.name), str(_trained(pointer))
    audited = {**model, "checkpoint": _located(policy)}
    if (Path(policy) / "adapter_config.json").exists():
        audited = {**model, **_own_start(Path(policy)), "adapter": _located(policy)}
    values: dict[str, Any] = {
        "name": plan,
        "store": str(store.resolve()),
        "evaluation": {
            "pairs": {"path": str(pairs.resolve()), "shape": shape or _shape_of_first(pairs)}
        },
        "models": {"reference": model, "policy": audited},
        "audits": {
            f"{audit}_audit" if audit in _TAKEN else audit: {
                "reference": "reference",
                "policy": "policy",
            }
        },
    }
    path = store.resolve() / plan / "plan.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    head = "# Written by `logratio audit`; edit it and run it again with `logratio run`.\n"
    path.write_text(head + yaml.safe_dump(values, sort_keys=False))
    return path


def _located(checkpoint: str) -> str:
    """An absolute path, or a name as it is."""
    return str(Path(checkpoint).resolve()) if Path(checkpoint).exists() else checkpoint


def _trained(pointer: Path) -> Path:
    """The directory behind `<store>/<plan>/policies/<objective>/current.json`."""
    try:
        identifier = json.loads(pointer.read_text())["policy_id"]
        directory = pointer.resolve().parents[3] / "policies" / str(identifier)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise PlanError(f"{pointer}: does not name a policy: {error}") from None
    if not directory.is_dir():
        raise PlanError(f"{pointer}: the policy it names is not at {directory}")
    return directory


def _own_start(policy: Path) -> dict[str, str]:
    """The checkpoint of an adapter that a plan has trained from another policy of the store."""
    try:
        start = Path(json.loads((policy / "policy.json").read_text())["start"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    beside = policy.resolve().parent
    if start.parent.name != beside.name:
        return {}  # a model: the reference, as for any adapter
    if not (beside / start.name).is_dir():
        raise PlanError(f"{policy}: the policy it was trained from is not at {beside / start.name}")
    return {"checkpoint": str(beside / start.name)}


def _shape_of_first(pairs: Path) -> str:
    return shape_of(Path(source_files("pairs", pairs)[0].url))


def _slug(text: str) -> str:
    """A name as plans have them."""
    slug = re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")[:50]
    return slug if slug[:1].isalpha() else f"p_{slug}"

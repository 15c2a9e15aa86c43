"""One self-contained HTML page: no script, no request to anywhere, every text escaped."""

from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from pipeline.report import figures, samples
from pipeline.report.inputs import ReportInput, finite_rows, ordered
from pipeline.report.numbers import report_json, report_numbers
from pipeline.report.text import count, label, number, passage, percent, sentence_case, significant

_TABLE_ROWS = 50
_OPEN_EXAMPLES = 3
_PROVENANCE_ROWS = 60
BASELINES = {
    "length": "length alone",
    "words": "a classifier of words",
    "reference_sum": "the reference, untrained",
    "reference_per_token": "the same, per token",
}
"""Names of `pipeline.report.baselines`."""


@dataclass(frozen=True)
class RenderedReport:
    """A report, ready to be written.

    Attributes:
        html: the page, at most about 3 MB.
        json: every number behind it.
        histogram_png: the margin histogram, below 50 KB.
        numbers: what `json` holds, as values.
    """

    html: str
    json: str
    histogram_png: bytes
    numbers: dict[str, Any]


def render(inp: ReportInput) -> RenderedReport:
    """The report of one policy; equal tables give equal bytes, whatever their order of rows.

    Raises:
        ReportError: the tables do not belong together.
    """
    inp = ordered(inp)
    numbers = report_numbers(inp)
    return RenderedReport(
        html=_page(replace(inp, rewards=finite_rows(inp.rewards)), numbers),
        json=report_json(numbers),
        histogram_png=figures.histogram_png(numbers["histogram"]),
        numbers=numbers,
    )


def _page(inp: ReportInput, numbers: dict[str, Any]) -> str:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        num=number, sig=significant, sentence=sentence_case, pct=percent, count=count, label=label
    )
    folder = files("pipeline.report")
    template = environment.from_string(folder.joinpath("page.html.j2").read_text("utf-8"))
    quarantine_rules = [row["rule"] for row in numbers["quarantined_by_rule"]]
    untokenized_rules = [row["rule"] for row in numbers["untokenized_by_rule"]]
    return template.render(
        n=numbers,
        css=Markup(folder.joinpath("page.css").read_text("utf-8")),
        loss={label(key): label(value) for key, value in sorted(inp.loss.items())},
        verdicts=_verdicts(numbers),
        headline=_headline(numbers),
        columns=_columns(numbers),
        agreement=_agreement_view(numbers),
        split_names=figures.SPLIT_NAMES,
        histogram=_histogram_view(numbers),
        training=_training_view(inp, numbers),
        quarantine=samples.quarantine_samples(inp.quarantine, quarantine_rules),
        untokenized=samples.untokenized_samples(inp.untokenized, inp.pairs, untokenized_rules),
        examples=samples.extremes(inp, numbers["held_out_split"]),
        provenance=[
            {"key": label(key), **passage(str(inp.provenance[key]))}
            for key in sorted(inp.provenance)[:_PROVENANCE_ROWS]
        ],
        open_examples=_OPEN_EXAMPLES,
        table_rows=_TABLE_ROWS,
        rules_with_samples=samples.RULES_WITH_SAMPLES,
    )


def _columns(numbers: dict[str, Any]) -> list[dict[str, Any]]:
    """The splits that have pairs, held-out first, then all together."""
    names = [name for name in figures.SPLIT_NAMES if numbers["splits"][name]["n"]]
    shown = [*names, "all"] if len(names) != 1 else names
    return [
        {"name": figures.SPLIT_NAMES.get(name, "all pairs"), **numbers["splits"][name]}
        for name in shown
    ]


def _verdicts(numbers: dict[str, Any]) -> list[dict[str, str]]:
    """The strip under the title: `state` is pass, warn, fail or info, and is also written out."""
    rows, pairs = numbers["rows"], numbers["pairs"]
    total, n_bad = rows["total"], numbers["finite"]["n_nonfinite"]
    noise, training = numbers["noise"], numbers["training"]
    kept = rows["n_without_reason"] == 0
    law = all(part["law_holds"] for part in (total, *rows["by_source"]))
    return [
        {
            "name": "Rows read",
            "value": "all accounted for" if law and kept else "do not add up",
            "state": "pass" if law and kept else "fail",
            "note": f"{count(total['n_in'])} read = {count(total['accepted'])} accepted + "
            f"{count(total['merged'])} merged + {count(total['quarantined'])} quarantined"
            + ("" if kept else f"; {count(rows['n_without_reason'])} quarantined without a reason"),
        },
        {
            "name": "Pairs",
            "value": f"{count(pairs['n_scored'])} scored",
            "state": "fail" if pairs["n_unaccounted"] else "pass",
            "note": f"of {count(pairs['n'])} valid pairs; {count(pairs['n_untokenized'])} could "
            f"not be tokenised, {count(pairs['n_left_out'])} left out by the plan, "
            f"{count(pairs['n_unaccounted'])} unexplained",
        },
        _start_verdict(training),
        {
            "name": "Numbers",
            "value": "all finite" if n_bad == 0 else f"{count(n_bad)} not finite",
            "state": "pass" if n_bad == 0 else "fail",
            "note": "no NaN and no infinity among the rewards"
            if n_bad == 0
            else "these pairs are left out of every statistic below",
        },
        {
            "name": "Noise floor",
            "value": "not measured"
            if noise["nats"] is None
            else f"{significant(noise['nats'])} nats",
            "state": "warn" if noise["nats"] is None else "info",
            "note": "no sequence was scored twice"
            if noise["margin"] is None
            else f"at worst ±{significant(noise['margin'])} on a margin "
            f"({count(numbers['splits']['all']['n_within_noise'])} pairs within it)",
        },
    ]


def _start_verdict(training: dict[str, Any] | None) -> dict[str, str]:
    if training is None:
        return {
            "name": "Start",
            "value": "no training log",
            "state": "info",
            "note": "the policy was trained elsewhere",
        }
    first = training["first"]
    value, state = {
        "exactly": ("is the reference", "pass"),
        "within_noise": ("is the reference, within noise", "pass"),
        "no": ("is not the reference", "info"),
        "has_none": ("the loss has no reference", "info"),
    }[training["starts_at_reference"]]
    return {
        "name": "Start",
        "value": value,
        "state": state,
        "note": f"before the first update: margin {number(first['rewards/margins'], 4)}, "
        f"accuracy {number(first['rewards/accuracies'], 2)} (all ties give 0.5), "
        f"loss {number(first['loss'], 4)}"
        + (" (ln 2 = 0.6931)" if figures.is_logistic(first["loss"]) else ""),
    }


def _headline(numbers: dict[str, Any]) -> list[str]:
    """What the numbers say, in sentences."""
    split = numbers["held_out_split"]
    shown = numbers["splits"][split or "all"]
    if not shown["n"]:
        return ["No pair was scored, so there is nothing to say about the policy."]
    where = f"{count(shown['n'])} {'pair' if shown['n'] == 1 else 'pairs'}"
    where += f" ({count(shown['n_prompts'])} distinct prompts)"
    if split is None:
        where += ", which the policy was trained on since none were held out,"
    elif numbers["training"] is not None:
        where += " held out from training"
    low, high = shown["accuracy_low"], shown["accuracy_high"]
    sentences = [
        f"On {where} the policy prefers the chosen reply in {percent(shown['accuracy'])} of cases "
        f"(95 % interval {percent(low)} to {percent(high)})."
    ]
    if low > 0.5:
        sentences.append("That is better than a coin toss.")
    elif high < 0.5:
        sentences.append("That is worse than a coin toss.")
    else:
        sentences.append("The interval includes 50 %, so a coin toss cannot be ruled out.")
    rule = numbers["baselines"]["length_rule"]
    others = {row["key"]: row["accuracy"] for row in numbers["baselines"]["rows"]}
    words, untrained = others["words"], percent(others["reference_sum"])
    length = others["length"]
    sentences.append(f"Always guessing the {rule} reply would reach {percent(length)}.")
    sentences.append(
        ("" if words is None else f"A classifier of the replies' words reaches {percent(words)}; ")
        + f"the untrained reference finds the chosen reply more likely in {untrained}."
    )
    sentences[-1] = sentence_case(sentences[-1])
    alike = [
        name
        for name, reached in ((f"the {rule} reply", length), ("the classifier", words))
        if reached is not None and reached > 0.5 and low <= reached <= high
    ]
    if alike:
        sentences.append(f"The policy cannot be told apart from {' or '.join(alike)}.")
    sentences.append(
        f"In {percent(shown['displaced_share'])} of these pairs the chosen reply is less likely "
        "than under the reference."
    )
    return sentences


def _agreement_view(numbers: dict[str, Any]) -> dict[str, Any] | None:
    """The policy beside its baselines, on the pairs it is judged by."""
    shown = numbers["splits"][numbers["held_out_split"] or "all"]
    if not shown["n"]:
        return None
    rows = [
        {"name": name, **{k: row[k] for k in ("accuracy", "accuracy_low", "accuracy_high")}}
        for name, row in [
            ("the policy", shown),
            *((BASELINES[row["key"]], row) for row in numbers["baselines"]["rows"]),
        ]
    ]
    drawn = [row for row in rows if row["accuracy"] is not None]
    said = ", ".join(f"{row['name']} {percent(row['accuracy'])}" for row in drawn)
    return {
        "wide": Markup(figures.agreement_svg(drawn, narrow=False)),
        "narrow": Markup(figures.agreement_svg(drawn, narrow=True)),
        "description": f"Accuracy on {count(shown['n'])} pairs: {said}.",
        "rows": rows,
        "n_fitted": numbers["baselines"]["n_fitted"],
        "crossed": numbers["baselines"]["cross_validated"],
        "rule": numbers["baselines"]["length_rule"],
    }


def _histogram_view(numbers: dict[str, Any]) -> dict[str, Any] | None:
    histogram = numbers["histogram"]
    if histogram is None:
        return None
    names = [name for name in figures.SPLIT_NAMES if name in histogram["counts"]]
    parts = []
    for name in names:
        low, median, high = (
            number(numbers["splits"][name][f"margin_{key}"], 3) for key in ("p05", "median", "p95")
        )
        parts.append(
            f"{sentence_case(figures.SPLIT_NAMES[name])}: median {median}, "
            f"5th to 95th percentile {low} to {high}"
        )
    return {
        "wide": Markup(figures.histogram_svg(histogram, narrow=False)),
        "narrow": Markup(figures.histogram_svg(histogram, narrow=True)),
        "description": f"Histogram of margins. {'. '.join(parts)}.",
        "summary": f"{'. '.join(parts)}.",
        "names": names,
        "bins": figures.bins(histogram),
        "n_outside": histogram["n_outside"],
    }


def _training_view(inp: ReportInput, numbers: dict[str, Any]) -> dict[str, Any] | None:
    training = numbers["training"]
    if training is None:
        return None
    curve, every = figures.thinned(inp.training_steps)
    first, last = training["first"], training["last"]
    return {
        "wide": Markup(figures.training_svg(curve, narrow=False)),
        "narrow": Markup(figures.training_svg(curve, narrow=True)),
        "description": f"Training over {count(training['n_steps'])} steps: loss from "
        f"{number(first['loss'], 4)} to {number(last['loss'], 4)}, accuracy from "
        f"{number(first['rewards/accuracies'], 3)} to {number(last['rewards/accuracies'], 3)}, "
        f"margin from {number(first['rewards/margins'], 3)} to "
        f"{number(last['rewards/margins'], 3)}.",
        "every": every,
        "ln2": figures.shows_ln2(curve),
    }

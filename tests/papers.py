"""The papers' formulas in 80 digits, and their slopes by differences: what the losses are held to.

Nothing here is ours: each formula is written from its paper, of Python's own decimals. A pair is a
mapping of its numbers, its loss's values and its statistics, by name. A formula may return the
terms of its sum, so that the slope of a tiny one is not lost beside a large one.
"""

from collections.abc import Callable, Mapping
from decimal import Decimal, localcontext

Exact = Mapping[str, Decimal]
Terms = Decimal | tuple[Decimal, ...]
Formula = Callable[[Exact], Terms]

DIGITS = 80
STEP = Decimal("1e-18")
ZERO, ONE = Decimal(0), Decimal(1)


def softplus(x: Decimal) -> Decimal:
    """ln(1 + exp(x)), with its relative precision far left."""
    if abs(x) > 1_000_000:  # exp(1e6) has 434,294 digits; float64 sees none of it
        return max(x, Decimal(0))
    small = x.exp()
    if x < -60:
        return small - small**2 / 2 + small**3 / 3
    return (1 + small).ln()


def sigmoid(x: Decimal) -> Decimal:
    return Decimal(x > 0) if abs(x) > 1_000_000 else 1 / (1 + (-x).exp())


def share(x: Decimal) -> tuple[Decimal, ...]:
    """Sigmoid(x) as terms: 1 and what it falls short of 1, once that is small."""
    return (sigmoid(x), ZERO) if x < 0 else (ONE, -sigmoid(-x))


def log_sigmoid(x: Decimal) -> Decimal:
    return -softplus(-x)


def ratio(x: Exact, side: str) -> Decimal:
    return x[f"policy_{side}"] - x[f"reference_{side}"]


def h(x: Exact) -> Decimal:
    return ratio(x, "chosen") - ratio(x, "rejected")


def reward(x: Exact, side: str) -> Decimal:
    return x["beta"] * ratio(x, side)


def mean(x: Exact, side: str) -> Decimal:
    return x[f"policy_{side}"] / x[f"n_{side}"]


# Rafailov et al. 2023, eq. 7
def dpo(x: Exact) -> Decimal:
    return -log_sigmoid(x["beta"] * h(x))


# Mitchell 2023
def cdpo(x: Exact) -> Decimal:
    m, e = x["beta"] * h(x), x["label_smoothing"]
    return -(1 - e) * log_sigmoid(m) - e * log_sigmoid(-m)


# Chowdhury et al. 2024: the loss whose mean over flipped labels is DPO's
def robust(x: Exact) -> Decimal:
    m, e = x["beta"] * h(x), x["label_smoothing"]
    return ((1 - e) * -log_sigmoid(m) - e * -log_sigmoid(-m)) / (1 - 2 * e)


# Lambert et al. 2024, eq. 6
def dpo_norm(x: Exact) -> Decimal:
    chosen, rejected = (ratio(x, s) / x[f"n_{s}"] for s in ("chosen", "rejected"))
    return -log_sigmoid(x["beta"] * chosen - x["beta"] * rejected)


# Park et al. 2024: rewards of r - alpha |y|
def rdpo(x: Exact) -> Decimal:
    longer = x["alpha"] * x["n_chosen"] - x["alpha"] * x["n_rejected"]
    return -log_sigmoid(x["beta"] * h(x) + longer)


# Pal et al. 2024, eq. 3: the penalty is max(0, log(reference / policy)) of the chosen reply
def dpop(x: Exact) -> Decimal:
    lost = max(Decimal(0), x["reference_chosen"] - x["policy_chosen"])
    return -log_sigmoid(x["beta"] * (h(x) - x["penalty"] * lost))


# Amini et al. 2024, with f = log
def odpo(x: Exact) -> Decimal:
    return -log_sigmoid(x["beta"] * h(x) - x["alpha"] * x["strength"].ln())


# Wu et al. 2024: beta of the batch, not below 0.001
def beta_dpo(x: Exact) -> Decimal:
    beta = (1 + x["alpha"] * x["surplus"]) * x["beta"]
    return -log_sigmoid(max(Decimal("0.001"), beta) * h(x))


# Azar et al. 2023, eq. 17
def ipo(x: Exact) -> Decimal:
    return (h(x) - 1 / (2 * x["beta"])) ** 2


def ipo_mean(x: Exact) -> Decimal:
    chosen, rejected = (ratio(x, s) / x[f"n_{s}"] for s in ("chosen", "rejected"))
    return (chosen - rejected - 1 / (2 * x["beta"])) ** 2


# The lecture, section 8.2
def lecture_ipo(x: Exact) -> Decimal:
    return (reward(x, "chosen") - reward(x, "rejected") - 1 / x["beta"]) ** 2


# Wu et al. 2024, algorithm 1: P = 1 for the winner, 0 for the loser, eta = 1 / beta
def sppo_hard(x: Exact) -> Decimal:
    eta, half = 1 / x["beta"], Decimal("0.5")
    return (ratio(x, "chosen") - eta * half) ** 2 + (ratio(x, "rejected") + eta * half) ** 2


# Liu et al. 2023, hinge-norm
def hinge(x: Exact) -> Decimal:
    return max(Decimal(0), 1 - x["beta"] * h(x))


# Ji et al. 2024, eq. 16: KL(p_policy || p_labels) over the two replies
def exo_pair(x: Exact) -> Decimal:
    m, e = x["beta"] * h(x), x["label_smoothing"]
    right = sigmoid(m) * (log_sigmoid(m) - (1 - e).ln())
    return right + sigmoid(-m) * (log_sigmoid(-m) - e.ln())


# Lu et al. 2024, eq. 5
def discopop(x: Exact) -> Decimal:
    m = x["beta"] * h(x)
    weight = sigmoid(m / x["tau"])
    # (1 - weight) is sigmoid(-m / tau), which keeps its digits.
    return sigmoid(-m / x["tau"]) * softplus(-m) + weight * (-m).exp()


def coin_kl(a: Decimal, b: Decimal) -> Decimal:
    """KL of the coin of log-odds a from that of log-odds b."""
    heads = sigmoid(a) * (log_sigmoid(a) - log_sigmoid(b))
    return heads + sigmoid(-a) * (log_sigmoid(-a) - log_sigmoid(-b))


# Reward-aware preference optimisation: three distances from the margin the strength asks for
def rpo_sq(x: Exact) -> Decimal:
    return (x["beta"] * h(x) - x["eta"] * x["strength"]) ** 2


def rpo_bwd_kl(x: Exact) -> Decimal:
    return coin_kl(x["eta"] * x["strength"], x["beta"] * h(x))


def rpo_fwd_kl(x: Exact) -> Decimal:
    return coin_kl(x["beta"] * h(x), x["eta"] * x["strength"])


# Wang et al. 2023, table 1: beta (f'(u_w) - f'(u_l))
def f_dpo(slope: Callable[[Decimal, Exact], Decimal]) -> Callable[[Exact], Decimal]:
    def loss(x: Exact) -> Decimal:
        chosen, rejected = (slope(ratio(x, s), x) for s in ("chosen", "rejected"))
        return -log_sigmoid(x["beta"] * (chosen - rejected))

    return loss


def forward_kl(log_u: Decimal, x: Exact) -> Decimal:
    return 1 - (-log_u).exp()


def alpha_divergence(log_u: Decimal, x: Exact) -> Decimal:
    return (1 - (-x["alpha"] * log_u).exp()) / x["alpha"]


def jensen_shannon(log_u: Decimal, x: Exact) -> Decimal:
    """ln(2u / (1 + u))"""
    return Decimal(2).ln() - softplus(-log_u)


# Ethayarajh et al. 2024, eq. 8: lambda_y - v(x, y), the mean over the two rows of a pair
def kto(x: Exact) -> Terms:
    z0 = max(Decimal(0), x["kl"])
    # 1 - sigmoid(u) is sigmoid(-u).
    desirable = share(-x["beta"] * (ratio(x, "chosen") - z0))
    undesirable = share(-x["beta"] * (z0 - ratio(x, "rejected")))
    of_desirable = tuple(x["desirable_weight"] * term / 2 for term in desirable)
    return *of_desirable, *(x["undesirable_weight"] * term / 2 for term in undesirable)


# The lecture, section 8.4; D'Oosterlinck et al. 2024, eq. 7
def apo_zero(x: Exact) -> Terms:
    return *share(-reward(x, "chosen")), *share(reward(x, "rejected"))


# D'Oosterlinck et al. 2024, eq. 8
def apo_down(x: Exact) -> Terms:
    return *share(reward(x, "chosen")), *share(-x["beta"] * h(x))


# Chen et al. 2024, K = 2
def nca_pair(x: Exact) -> Terms:
    w, l = reward(x, "chosen"), reward(x, "rejected")  # noqa: E741
    return -log_sigmoid(w), -log_sigmoid(-w) / 2, -log_sigmoid(-l) / 2


# Jung et al. 2024
def bco_pair(x: Exact) -> Terms:
    w, l = reward(x, "chosen"), reward(x, "rejected")  # noqa: E741
    return -log_sigmoid(w - x["shift"]), -log_sigmoid(-(l - x["shift"]))


def bco_unpaired(x: Exact) -> Terms:
    w, l = reward(x, "chosen"), reward(x, "rejected")  # noqa: E741
    undesirable = x["undesirable_weight"] * -log_sigmoid(-(l - x["shift"]))
    return -log_sigmoid(w - x["shift"]) / 2, undesirable / 2


def bco_pair_unshifted(x: Exact) -> Terms:
    return -log_sigmoid(reward(x, "chosen")), -log_sigmoid(-reward(x, "rejected"))


# Meng et al. 2024, eq. 6
def simpo(x: Exact) -> Decimal:
    chosen = x["beta"] / x["n_chosen"] * x["policy_chosen"]
    rejected = x["beta"] / x["n_rejected"] * x["policy_rejected"]
    return -log_sigmoid(chosen - rejected - x["gamma"])


def simpo_ratio(x: Exact) -> Decimal:
    apart = mean(x, "chosen") - mean(x, "rejected") - x["gamma_ratio"]
    return -log_sigmoid(x["beta"] * apart)


# Xu et al. 2024: L_prefer + L_NLL, sums
def cpo(x: Exact) -> Terms:
    prefer = -log_sigmoid(x["beta"] * x["policy_chosen"] - x["beta"] * x["policy_rejected"])
    return prefer, x["nll_weight"] * -x["policy_chosen"]


# Zhao et al. 2023, eq. 1
def slic(x: Exact) -> Decimal:
    calibration = max(Decimal(0), x["delta"] - x["policy_chosen"] + x["policy_rejected"])
    return calibration - x["nll_weight"] * x["policy_chosen"]


# Gupta et al. 2025: rewards (1 - p^-alpha) / alpha of the mean log-prob
def alphapo(x: Exact) -> Decimal:
    chosen, rejected = (alphapo_score(x, s) for s in ("chosen", "rejected"))
    return -log_sigmoid(chosen - rejected - x["gamma"])


def alphapo_score(x: Exact, side: str) -> Decimal:
    if x["alpha"] == 0:
        return x["beta"] * mean(x, side)
    return x["beta"] * (1 - (-x["alpha"] * mean(x, side)).exp()) / x["alpha"]


# Hong et al. 2024, eq. 4, 6, 7
def log_odds(x: Exact, side: str) -> Decimal:
    p = mean(x, side).exp()
    return (p / (1 - p)).ln()


def orpo(x: Exact) -> Terms:
    odds_ratio = log_odds(x, "chosen") - log_odds(x, "rejected")
    return -mean(x, "chosen"), -x["beta"] * log_sigmoid(odds_ratio)


# Saeidi et al. 2024
def tpo_l(x: Exact) -> Terms:
    return simpo(x), x["nll_weight"] * -(x["gold_logprob"] / x["n_gold"])


def nll_sum(x: Exact) -> Decimal:
    return -x["policy_chosen"]


def nll_mean(x: Exact) -> Decimal:
    return -x["policy_chosen"] / x["n_chosen"]


def nll_token_mean(x: Exact) -> Decimal:
    return -x["policy_chosen"] / x["tokens"]


# Liu et al. 2024: p(y) = prod up to the public length x (prod beyond it)^alpha
def ld(x: Exact, model: str, side: str) -> Decimal:
    prefix = x[f"{model}_prefix_{side}"]
    return prefix + x["alpha"] * (x[f"{model}_{side}"] - prefix)


def ld_score(x: Exact, side: str) -> Decimal:
    return x["beta"] * (ld(x, "policy", side) - ld(x, "reference", side))


def ld_dpo(x: Exact) -> Decimal:
    return -log_sigmoid(ld_score(x, "chosen") - ld_score(x, "rejected"))


def ld_policy_score(x: Exact, side: str) -> Decimal:
    return x["beta"] * (ld(x, "policy", side) - x[f"reference_{side}"])


def ld_dpo_policy(x: Exact) -> Decimal:
    return -log_sigmoid(ld_policy_score(x, "chosen") - ld_policy_score(x, "rejected"))


# Zhou et al. 2024, eq. 2
def wpo(x: Exact) -> Decimal:
    return x["alignment_chosen"].exp() * x["alignment_rejected"].exp() * dpo(x)


# Zeng et al. 2024: u - delta, u - alpha delta
def tdpo1(x: Exact) -> Decimal:
    delta = x["beta"] * x["sequential_kl_rejected"] - x["beta"] * x["sequential_kl_chosen"]
    return -log_sigmoid(x["beta"] * h(x) - delta)


def tdpo2(x: Exact) -> Decimal:
    delta = x["beta"] * x["sequential_kl_rejected"] - x["beta"] * x["sequential_kl_chosen"]
    return -log_sigmoid(x["beta"] * h(x) - x["alpha"] * delta)


FORMULAS: dict[str, Formula] = {
    form.__name__: form
    for form in (
        *(dpo, cdpo, robust, dpo_norm, rdpo, dpop, odpo, beta_dpo),
        *(ipo, ipo_mean, lecture_ipo, sppo_hard),
        *(hinge, exo_pair, discopop, rpo_sq, rpo_bwd_kl, rpo_fwd_kl),
        *(kto, apo_zero, apo_down, nca_pair, bco_pair, bco_unpaired, bco_pair_unshifted),
        *(simpo, simpo_ratio, cpo, slic, alphapo, orpo, tpo_l),
        *(nll_sum, nll_mean, nll_token_mean, ld_dpo, ld_dpo_policy, wpo, tdpo1, tdpo2),
    )
} | {
    "lecture_kto": apo_zero,
    "fdpo_forward_kl": f_dpo(forward_kl),
    "fdpo_alpha": f_dpo(alpha_divergence),
    "fdpo_js": f_dpo(jensen_shannon),
}
"""Every loss of a pair by itself, given its statistics; AOT, which sorts, has a test of its own."""

_BY_SCORE: dict[Callable[[Exact, str], Decimal], tuple[str, ...]] = {
    lambda x, s: ratio(x, s): ("ipo", "sppo_hard"),
    lambda x, s: ratio(x, s) / x[f"n_{s}"]: ("ipo_mean",),
    lambda x, s: x["beta"] * ratio(x, s) / x[f"n_{s}"]: ("dpo_norm",),
    lambda x, s: x[f"policy_{s}"]: ("slic", "nll_sum", "nll_token_mean"),
    lambda x, s: x["beta"] * x[f"policy_{s}"]: ("cpo",),
    lambda x, s: mean(x, s): ("nll_mean",),
    lambda x, s: x["beta"] * mean(x, s): ("simpo", "simpo_ratio", "tpo_l"),
    alphapo_score: ("alphapo",),
    log_odds: ("orpo",),
    ld_score: ("ld_dpo",),
    ld_policy_score: ("ld_dpo_policy",),
    lambda x, s: x["beta"] * forward_kl(ratio(x, s), x): ("fdpo_forward_kl",),
    lambda x, s: x["beta"] * alpha_divergence(ratio(x, s), x): ("fdpo_alpha",),
    lambda x, s: x["beta"] * jensen_shannon(ratio(x, s), x): ("fdpo_js",),
}
SCORES = dict.fromkeys(FORMULAS, reward) | {
    name: score for score, names in _BY_SCORE.items() for name in names
}
"""What each loss scores a reply with: the implicit reward unless said otherwise."""


def decimals(numbers: Mapping[str, float]) -> dict[str, Decimal]:
    return {key: Decimal(number) for key, number in numbers.items()}


def terms(found: Terms) -> tuple[Decimal, ...]:
    return found if isinstance(found, tuple) else (found,)


def exact(form: Formula, numbers: Mapping[str, float], digits: int = DIGITS) -> float:
    """A formula at these very floats."""
    with localcontext(prec=digits):
        return float(sum(terms(form(decimals(numbers)))))


def slope(form: Formula, numbers: Mapping[str, float], of: str, digits: int = DIGITS) -> float:
    """Its derivative by one of the numbers: a central difference, exact to some 1e-30."""
    with localcontext(prec=digits):
        x = decimals(numbers)
        above, below = (terms(form({**x, of: x[of] + step})) for step in (STEP, -STEP))
        moved = sum(a - b for a, b in zip(above, below, strict=True))
        return float(moved / (2 * STEP))

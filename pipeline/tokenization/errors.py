"""Why a pair or a label has no token ids."""


class PairError(Exception):
    """A pair (or label) this tokenisation cannot carry; becomes a row of `untokenized_pairs`."""

    def __init__(self, rule: str, detail: str) -> None:
        super().__init__(f"{rule}: {detail}")
        self.rule = rule
        self.detail = detail


class LimitBroken(PairError):
    """The template took too much time, memory or text for it, or its process with it."""

    def __init__(self, cause: str) -> None:
        super().__init__("template_failed", f"the template broke a limit: {cause}")

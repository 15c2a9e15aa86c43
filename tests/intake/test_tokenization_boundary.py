"""`boundary_merge` is found from a few characters; it must be what encoding the whole says."""

import json
import random
from typing import Any

import numpy as np
import pytest
from tokens import load

from pipeline.plan import TokenizationConfig
from pipeline.tokenization import Encoder, control_strings
from pipeline.tokenization.boundary import WORD_PATTERNS, Boundary, splits_between_words
from pipeline.tokenization.definition import definition_of

TEXT = (
    "The answer is that it depends on what was asked. I'll say it's 1234567 or 89,\n\n  not 'the "
    "rest'\tof it.\r\n don't there there's  the   them aa aaa ab abc    def \n\n\n x=(y) ... --> é "
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def trained(pre_tokenizer: Any, normalizer: Any = None, special: list[Any] | None = None) -> Any:
    """A byte-level BPE tokeniser with many merges, over spaces and line ends too."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [TEXT[i:] for i in range(0, len(TEXT), 3)]
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    if special is not None:
        fast.add_tokens(special)
    return fast


def byte_level(*, prefix: bool = False, regex: bool = True) -> Any:
    from tokenizers import pre_tokenizers

    return pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=regex)


def by(pattern: str) -> Any:
    from tokenizers import Regex, pre_tokenizers

    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, byte_level(regex=False)])


def made(name: str) -> tuple[Any, bool, bool]:
    """A tokeniser; whether its added tokens bound what a boundary can do; whether words do."""
    from tokenizers import AddedToken, normalizers, pre_tokenizers

    llama, qwen = sorted(WORD_PATTERNS, key=lambda p: r"{1,3}" not in p)
    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), byte_level()])
    looks_back = r"(?<=\p{L}) \p{L}+|\p{L}+|\s+|[^\s\p{L}]+"
    match name:
        case "gpt-2":
            return trained(byte_level()), True, True
        case "smollm2":
            return trained(digits), True, True
        case "llama-3":
            return trained(by(llama)), True, True
        case "qwen":
            return trained(by(qwen), normalizers.NFC()), True, True
        case "a space before":
            return trained(byte_level(prefix=True)), True, False
        case "no words at all":
            return trained(byte_level(regex=False)), True, False
        case "a regex that looks back":
            return trained(by(looks_back)), True, False
        case "another normaliser":
            return trained(byte_level(), normalizers.Strip()), True, False
        case "metaspace":
            return trained(pre_tokenizers.Metaspace(prepend_scheme="first")), True, False
        case "tokens that overlap":
            return trained(byte_level(), special=["\n\n", "\n\n\n", "><|"]), False, True
        case "tokens that take spaces":
            special = [AddedToken("<x>", rstrip=True, lstrip=True)]
            return trained(byte_level(), special=special), False, True
        case "tokens after the normaliser":
            special = [AddedToken("<é>", normalized=True, special=False)]
            return trained(byte_level(), normalizers.NFD(), special), False, True
    raise KeyError(name)


NAMES = [
    "gpt-2",
    "smollm2",
    "llama-3",
    "qwen",
    "a space before",
    "no words at all",
    "a regex that looks back",
    "another normaliser",
    "metaspace",
    "tokens that overlap",
    "tokens that take spaces",
    "tokens after the normaliser",
]
PIECES = [
    *["<|im_start|>", "<|im_end|>", "<|im_", "end|>", "<|", "<x>", "<", ">", "assistant", "\n"],
    *["\n\n", " ", "  ", "\t", "t", "th", "he", "the", " the", "there ", "'s", "'", "l", "don't"],
    *["a", "aa", "1", "12", "345", "...", ". ", "\r\n", "e", "\u0301", "é", "😀", "日本", "\u00a0"],
    *["word word ", "asked what", " it depends on"],
]


def encoder_of(tokenizer: Any) -> Encoder:
    tokenizer.chat_template = "{{ messages[0].content }}"
    return Encoder(tokenizer, TokenizationConfig(control_tokens="allow"))


@pytest.mark.parametrize("name", NAMES)
def test_a_few_characters_decide_as_the_whole_does(name: str) -> None:
    tokenizer, anchored, words = made(name)
    definition = definition_of(tokenizer)
    boundary = Boundary(definition, control_strings(tokenizer))
    assert (boundary._anchored, splits_between_words(definition)) == (anchored, words)
    encoder = encoder_of(tokenizer)
    draw = random.Random(name)

    def text() -> str:
        return "".join(draw.choices(PIECES, k=draw.randint(0, 6)))

    headers = ["", "<|im_start|>assistant\n", "<|im_start|>"]
    texts = [(text() + draw.choice(headers) + text(), text()) for _ in range(2000)]
    whole = [prompt + completion for prompt, completion in texts]
    prompts, completions, joint = (
        [e.ids for e in tokenizer.backend_tokenizer.encode_batch(part, add_special_tokens=False)]
        for part in (*zip(*texts, strict=True), whole)
    )
    expected = [p + c != j for p, c, j in zip(prompts, completions, joint, strict=True)]
    assert encoder.merges(texts) == expected
    assert 50 < sum(expected) < 1950, "the control: both kinds were met"


def test_long_texts_are_cut_short(tokenizer: Any) -> None:
    boundary = Boundary(definition_of(tokenizer), control_strings(tokenizer))
    prompt = "<|im_start|>user\n" + "word " * 999 + "<|im_end|>\n<|im_start|>assistant\n"
    assert boundary.halves(prompt, "Sure thing, " * 500) == (
        "<|im_start|>assistant\n",
        "Sure",
    )
    assert boundary.halves(prompt, "1 2 3<|im_end|>\n<|im_end|>")[1] == "1 2 3"
    assert boundary.halves(prompt, "日本語" * 500 + "<|im_end|>\n")[1] == "日本語" * 500
    assert boundary.halves(prompt, "<|im_end|>\n")[1] == ""
    # A control token over the boundary, or none to hold on to: the whole.
    assert boundary.halves(prompt + "<|im_", "end|> a b") == (prompt + "<|im_", "end|> a b")
    assert boundary.halves("say t", "he word word") == ("say t", "he word word")


def test_no_known_pattern_matches_over_the_place_of_a_cut() -> None:
    """What the cut between words rests on, tried on the regular expressions themselves."""
    from tokenizers import Regex, pre_tokenizers

    generator = np.random.default_rng(0)
    alphabet = list("ab'sSſtéß1 \t\n\r.,-<>\u00a0\u0301日😀")
    for pattern in WORD_PATTERNS:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        for splitter in (split, byte_level()):
            for _ in range(400):
                left = "".join(generator.choice(alphabet, 6)) + "a"
                right = " b" + "".join(generator.choice(alphabet, 6))
                whole = [piece for piece, _ in splitter.pre_tokenize_str(left + right)]
                apart = [
                    piece for text in (left, right) for piece, _ in splitter.pre_tokenize_str(text)
                ]
                assert whole == apart, (pattern, left, right)


def test_the_patterns_are_those_of_published_tokenisers() -> None:
    """As `tokenizer.json` of Llama 3 and of Qwen 2.5 has them."""
    llama = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    assert {llama, llama.replace("{1,3}", "")} == WORD_PATTERNS
    definition = json.loads(json.dumps(definition_of(made("llama-3")[0])))
    assert splits_between_words(definition)
    for change in (
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": None},
        {"model": {**definition["model"], "dropout": 0.1}},
        {"model": {**definition["model"], "type": "Unigram"}},
    ):
        assert not splits_between_words({**definition, **change})


def test_the_packaged_tokeniser_is_one_of_them(packaged_model: Any) -> None:
    tokenizer = load(packaged_model.path)
    boundary = Boundary(definition_of(tokenizer), control_strings(tokenizer))
    assert boundary._anchored
    assert boundary._words

"""What makes a sequence, a tokenisation and a tokeniser the same, and what another."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import CHATML
from tokens import PAIRS, load, tokenize

from pipeline.errors import ModelError
from pipeline.plan import TokenizationConfig
from pipeline.tokenization import Encoder, require_same_tokenizer, sequence_id

# Identities


def test_a_sequence_is_its_ids_and_spans() -> None:
    one, two, three = (np.array(x, np.int32) for x in ([1], [2], [3]))
    both = np.array([1, 2], np.int32)
    base = sequence_id(both, three, [(0, 1)])
    assert base == sequence_id(both.astype(np.int64), three, [(0, 1)])
    others = [
        sequence_id(one, np.array([2, 3], np.int32), [(0, 1)]),  # another boundary
        sequence_id(both, two, [(0, 1)]),
        sequence_id(both[::-1], three, [(0, 1)]),
        sequence_id(both, three, [(0, 0)]),
        sequence_id(both, three, [(0, 1), (1, 1)]),
        sequence_id(both, three, []),
    ]
    assert len({base, *others}) == len(others) + 1


def test_equal_ids_are_one_sequence_under_any_tokenisation(
    tiny_model: Path, tokenizer: Any
) -> None:
    first = tokenize(tokenizer, *PAIRS)
    # The same text from another template, and other settings that change no id here.
    spelled = load(tiny_model, CHATML.replace("message", "turn").replace("turns", "messages"))
    second = tokenize(
        spelled, *PAIRS, max_length=300, over_long="keep_start", control_tokens="allow"
    )
    assert first.tokenization["tokenization_id"][0] != second.tokenization["tokenization_id"][0]
    assert first.sequences.equals(second.sequences)
    ways = [tables.pair_sequences.drop("tokenization_id") for tables in (first, second)]
    assert ways[0].equals(ways[1])
    row = first.sequences.row(0, named=True)
    prompt, completion = (np.array(row[key]) for key in ("prompt_ids", "completion_ids"))
    assert row["sequence_id"] == sequence_id(prompt, completion, [(0, row["n_scored"])])


def tokenization_id(tokenizer: Any, **settings: Any) -> str:
    identity = Encoder(tokenizer, TokenizationConfig(**settings)).identity()
    found: str = identity["tokenization_id"].item()
    return found


def test_everything_that_can_change_ids_changes_the_tokenisation_id(tiny_model: Path) -> None:
    from tokenizers import AddedToken, normalizers

    settings: dict[str, Any] = {
        "max_length": 2047,
        "over_long": "keep_start",
        "completion_tail": "eos",
        "control_tokens": "allow",
        "pinned_date": "2024-07-04",
    }
    assert set(settings) == set(TokenizationConfig.model_fields)
    seen = {tokenization_id(load(tiny_model))}
    seen |= {tokenization_id(load(tiny_model), **{key: value}) for key, value in settings.items()}
    seen |= {
        tokenization_id(load(tiny_model), control_tokens="reject"),
        tokenization_id(load(tiny_model, CHATML + " ")),
    }
    added, normalized, begun, ended = (load(tiny_model) for _ in range(4))
    added.add_tokens([AddedToken("<new>")])
    normalized.backend_tokenizer.normalizer = normalizers.NFC()
    begun.bos_token = "<|endoftext|>"  # a template may write it
    ended.eos_token = "<|endoftext|>"  # the eos tail and a template may
    seen |= {tokenization_id(one) for one in (added, normalized, begun, ended)}
    assert len(seen) == 1 + len(settings) + 2 + 4


def test_what_cannot_change_ids_leaves_the_tokenisation_id(
    tiny_model: Path, tmp_path: Path
) -> None:
    tokenizer = load(tiny_model)
    expected = tokenization_id(tokenizer)
    tokenizer.save_pretrained(tmp_path / "moved")
    assert tokenization_id(load(tmp_path / "moved")) == expected
    # Left over from an earlier call, and saved with many a fine-tuned checkpoint.
    tokenizer(["a", "b c"], padding=True, truncation=True, max_length=3)
    assert tokenizer.backend_tokenizer.truncation is not None, "the control"
    assert tokenization_id(tokenizer) == expected


def test_saved_truncation_and_padding_do_not_touch_the_ids(
    tiny_model: Path, tmp_path: Path
) -> None:
    expected = tokenize(load(tiny_model), *PAIRS).sequences
    tokenizer = load(tiny_model)
    tokenizer.backend_tokenizer.enable_truncation(5)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    tokenizer.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    assert saved["truncation"]["max_length"] == 5, "the control"
    assert tokenize(load(tmp_path), *PAIRS).sequences.equals(expected)


# One tokeniser for all models


def changed(tokenizer: Any, change: Any) -> Any:
    """A copy of a tokeniser with its definition changed."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    change(definition)
    backend = Tokenizer.from_str(json.dumps(definition))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")


def swap(definition: dict[str, Any]) -> None:
    vocabulary = definition["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]


def test_models_must_share_their_tokens(tokenizer: Any) -> None:
    require_same_tokenizer({"sft": tokenizer})
    require_same_tokenizer({"sft": tokenizer, "base": changed(tokenizer, lambda d: None)})
    a, b = (tokenizer.convert_tokens_to_ids(letter) for letter in "ab")
    assert a < b
    with pytest.raises(ModelError) as caught:
        require_same_tokenizer(
            {"sft": tokenizer, "same": tokenizer, "base": changed(tokenizer, swap)}
        )
    assert str(caught.value) == (
        f"models 'sft' and 'base' have different tokenisers: token {a} is 'a' in one and 'b' in "
        "the other"
    )


def test_a_longer_vocabulary_is_another(tiny_model: Path, tokenizer: Any) -> None:
    longer = load(tiny_model)
    longer.add_tokens(["<new>"])
    first = len(tokenizer)
    with pytest.raises(ModelError, match=rf"token {first} is None in one and '<new>' in the other"):
        require_same_tokenizer({"sft": tokenizer, "longer": longer})
    with pytest.raises(ModelError, match=rf"token {first} is '<new>' in one and None in the other"):
        require_same_tokenizer({"longer": longer, "sft": tokenizer})


def test_one_vocabulary_that_splits_text_otherwise_is_another(tokenizer: Any) -> None:
    def spaced(definition: dict[str, Any]) -> None:
        definition["pre_tokenizer"]["add_prefix_space"] = True

    with pytest.raises(ModelError, match="'sft' and 'spaced' have one vocabulary but split text"):
        require_same_tokenizer({"sft": tokenizer, "spaced": changed(tokenizer, spaced)})


def test_padding_and_truncation_make_no_other_tokeniser(tiny_model: Path, tokenizer: Any) -> None:
    other = load(tiny_model)
    other(["a", "b c"], padding=True, truncation=True, max_length=3)
    require_same_tokenizer({"sft": tokenizer, "tuned": other})

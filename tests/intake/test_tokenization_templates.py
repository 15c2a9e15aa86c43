"""Templates are programs by strangers: what they write, and what they cannot do to us."""

import os
import resource
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import templates
from support import CHATML
from templates import GEMMA, LLAMA_3, LLAMA_3_2, MARKED, MISTRAL, QWEN, ZEPHYR
from tokens import load, pair, sides, tokenize

from pipeline.errors import ModelError
from pipeline.plan import TokenizationConfig
from pipeline.tokenization import Encoder, PairError, render_child, rendering
from pipeline.tokenization.rendering import Messages, Rendered, Renderer

PUBLISHED = {
    "chatml": CHATML,
    "llama_3": LLAMA_3,
    "gemma": GEMMA,
    "mistral": MISTRAL,
    "zephyr": ZEPHYR,
    "qwen": QWEN,
    "marked": MARKED,
}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


def asked(said: str = "hi") -> Messages:
    return [{"role": "user", "content": said}]


def texts(rendered: Rendered) -> list[str]:
    """The prompt's text and the whole conversations', or what was said instead."""
    if isinstance(rendered.prompt, PairError):
        return [rendered.prompt.detail]
    found = [rendered.prompt]
    for rest, whole in zip(rendered.rests, rendered.wholes, strict=True):
        if isinstance(whole, PairError):
            found.append(whole.detail)
        else:
            found.append(
                rendered.prompt + rest if whole is None and rest is not None else whole or ""
            )
    return found


def by_transformers(tokenizer: Any, messages: Messages, replies: list[str]) -> list[str]:
    """The same, by `apply_chat_template`."""
    try:
        found = [
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ]
    except Exception as error:  # a template may raise anything
        return [str(error)[:500]]
    for reply in replies:
        whole = [*messages, {"role": "assistant", "content": reply}]
        try:
            found.append(tokenizer.apply_chat_template(whole, tokenize=False))
        except Exception as error:
            found.append(str(error)[:500])
    return found


# What they write


@pytest.mark.parametrize("name", PUBLISHED)
def test_texts_are_those_of_transformers(tokenizer: Any, name: str) -> None:
    tokenizer.bos_token, tokenizer.eos_token = "<s>", "</s>"
    tokenizer.chat_template = PUBLISHED[name]
    batch = templates.conversations(120, seed=len(name))
    renderer = Renderer(PUBLISHED[name], dict(tokenizer.special_tokens_map), None)
    found = [texts(rendered) for rendered in renderer.render(batch)]
    expected = [by_transformers(tokenizer, *conversation) for conversation in batch]
    assert found == expected
    assert len({text for row in expected for text in row}) > 100, "they differ from one another"
    n_failed = sum(len(row) == 1 for row in expected)
    assert (n_failed > 0) == (name in ("gemma", "mistral")), "the control: some are refused"


def test_the_settings_matter(tokenizer: Any) -> None:
    """The control: plain Jinja writes other texts for these templates."""
    import jinja2

    for template in (ZEPHYR, MARKED.replace("{% break %}", "")):
        plain = template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
        text = jinja2.Template(plain).render(messages=asked("<é>"), **SPECIAL)
        assert text != texts(Renderer(template, SPECIAL, None).render([(asked("<é>"), [])])[0])[0]


# What they cannot do

HOSTILE = {
    "endless loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% if a < 0 %}"
    "{{ a }}{% endif %}{% endfor %}{% endfor %}",
    "a long text in the making": "{{ 'a' * 200000000 }}",  # Jinja multiplies as it compiles
    "a long text": "{{ 'a' * (messages | length * 50000000) }}",
    "text by doubling": "{% set n = namespace(s='ab') %}"
    "{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}{{ n.s }}",
    "all of memory": "{{ 'a' * (2 ** 40) }}",
    "lists of lists": "{% set n = namespace(s=[0]) %}"
    "{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}{{ n.s | length }}",
    "a power": "{{ 9 ** (9 ** 9) }}",
    "a power of what is said": "{{ (messages | length + 8) ** (9 ** 9) }}",
    "one long step": "{% set s = 'a' * 1000000 %}{{ ([s + 'b'] * 1000000).count(s + 'c') }}",
    "an endless range": "{% for i in range(10 ** 9) %}a{% endfor %}",
    "a wide field": "{{ '%999999999d' % 1 }}",
    "a wide format": "{{ '{:>999999999}'.format('a') }}",
    "an endless macro": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "an endless macro of words": "{% macro f(x) %}{{ x }}{{ f(x + x) }}{% endmacro %}{{ f('a') }}",
    "many words": "{{ lipsum(n=100000) }}",
    "a wide indent": "{{ ('a\n' * 99999) | indent(99999) }}",
    "deep brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "deep lists": "{% set x = " + "[" * 90 + "]" * 90 + " %}{{ x" + "[0]" * 9999 + "}}",
    "the class of a text": "{{ ''.__class__.__mro__[1].__subclasses__()[0] }}",
    "lipsum's globals": "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "cycler's globals": "{{ cycler.__init__.__globals__.os.system('kill -9 $PPID') }}",
    "raise_exception's globals": "{{ raise_exception.__globals__['os'].abort() }}",
    "attributes by name": "{{ ''|attr('__class__')|attr('__mro__') }}{{ nothing.there.at.all }}",
    "a format that looks": "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
    "changing what is given": "{{ messages.append(1) }}",
    "a file": "{% include '/etc/passwd' %}",
    "another module": "{% import 'os' as os %}{{ os.abort() }}",
    "half a surrogate pair": "{{ '\\ud800' }}",
    "no template": "{% for",
    "an unknown filter": "{{ messages | os }}",
}  # fmt: skip
"""All of these are refused or fail; none may cost more than itself."""


def resident() -> int:
    """Memory this process holds, in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() >> 20


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_an_error(tokenizer: Any, name: str) -> None:
    before = resident()
    tokenizer.chat_template = HOSTILE[name] + CHATML
    try:
        tables = tokenize(tokenizer, pair("q"), pair("r"))
    except ModelError as error:
        refused = str(error)
    else:
        refused = "chat template"
        assert tables.untokenized["rule"].to_list() == ["template_failed"] * 2
        assert tables.untokenized["detail"].str.len_chars().is_between(5, 600).all()
    assert "chat template" in refused
    assert len(refused) < 700
    assert resident() < before + 100, "it cannot fill this process either"


SPARED = "{% if 'bomb' in messages[-1].content %}@{% endif %}" + CHATML
CAUSES = {
    "endless loops": "2 s of CPU time",
    "a long text": "characters, more than",
    "text by doubling": "1024 MiB of memory",
    "one long step": "3 s of CPU time in one step",
    "an endless macro": "recursion",
    "lipsum's globals": "unsafe",
    "an endless range": "Range too big",
}


@pytest.mark.parametrize("name", CAUSES)
def test_it_costs_the_rows_that_set_it_off(tokenizer: Any, name: str) -> None:
    """The template is well-behaved until it meets a word; the others' texts are as ever."""
    harmless = [pair(f"q{i}", row=i) for i in range(4)]
    expected = tokenize(tokenizer, *harmless)
    tokenizer.chat_template = SPARED.replace("@", HOSTILE[name])
    guilty = [pair("a bomb", row=4), pair("q0", "yes", "bomb", row=5), pair("q1", "bomb", "no")]
    mixed = [harmless[0], guilty[0], *harmless[1:3], *guilty[1:], harmless[3]]
    tables = tokenize(tokenizer, *mixed)
    assert tables.sequences.equals(expected.sequences)
    lost = dict(tables.untokenized.select("pair_id", "detail").iter_rows())
    assert set(lost) == {p["pair_id"] for p in guilty}
    assert tables.untokenized["rule"].unique().to_list() == ["template_failed"]
    for detail in lost.values():
        assert CAUSES[name] in detail


def test_a_process_that_is_killed_is_started_again() -> None:
    renderer = Renderer(CHATML, {}, None)
    expected = renderer.render([(asked(), ["a"])])
    process = renderer._child._process
    process.kill()
    assert renderer.render([(asked(), ["a"])]) == expected
    assert renderer._child._process.pid != process.pid
    # In the middle of a batch, too.
    batch = [(asked(f"hello {i} " * 50), ["a" * 200]) for i in range(3000)]
    expected = Renderer(CHATML, {}, None).render(batch)
    threading.Timer(0.02, renderer._child._process.kill).start()
    assert renderer.render(batch) == expected


def test_a_template_that_goes_on_breaking_limits_is_given_up(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendering, "MOST_BROKEN_LIMITS", 3)
    tokenizer.chat_template = SPARED.replace("@", HOSTILE["a long text"])
    two, three = ([pair(f"bomb {i}") for i in range(n)] for n in (2, 3))
    assert tokenize(tokenizer, *two).untokenized.height == 2
    with pytest.raises(ModelError, match="broke a limit in 3 renderings"):
        tokenize(tokenizer, *three)


def test_the_process_ends_with_its_renderer() -> None:
    renderer = Renderer(CHATML, {}, None)
    process = renderer._child._process
    assert process.poll() is None
    del renderer
    assert process.poll() is not None


def test_the_process_is_light_and_sees_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "hush")
    renderer = Renderer(CHATML, {}, None)
    process = Path(f"/proc/{renderer._child._process.pid}")
    assert b"hush" not in (process / "environ").read_bytes()
    assert b"PATH=" in (process / "environ").read_bytes(), "the control"
    loaded = (process / "maps").read_text()
    assert "libpython" in loaded or "python3" in loaded, "the control"
    assert not any(name in loaded for name in ("torch", "polars", "tokenizers", "numpy"))
    limit = (process / "limits").read_text()
    assert f"Max address space         {render_child.MEMORY_BYTES}" in limit


def test_it_is_not_reached_by_an_interrupt() -> None:
    renderer = Renderer(CHATML, {}, None)
    process = renderer._child._process
    process.send_signal(2)
    assert len(renderer.render([(asked(), ["a"])])) == 1
    assert renderer._child._process is process


def test_a_parent_that_dies_leaves_no_process(tmp_path: Path) -> None:
    code = (
        "import os, sys\n"
        "from pipeline.tokenization.rendering import Renderer\n"
        f"renderer = Renderer({CHATML!r}, {{}}, None)\n"
        "print(renderer._child._process.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    child = int(done.stdout)
    for _ in range(100):
        if not _runs(child):
            return
        threading.Event().wait(0.05)
    raise AssertionError(f"process {child} is still there")


def _runs(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


# Dates and chance


def test_a_template_that_shows_the_date_is_refused_or_pinned(tiny_model: Path) -> None:
    tokenizer = load(tiny_model, LLAMA_3_2)
    tokenizer.bos_token = "<|endoftext|>"
    with pytest.raises(ModelError, match="shows today's date"):
        Encoder(tokenizer, TokenizationConfig())
    tables = tokenize(tokenizer, pair("q"), pinned_date="2024-07-04")
    prompt = tokenizer.decode(sides(tables)[0]["prompt_ids"])
    assert "Today Date: 04 Jul 2024\n" in prompt
    # transformers, given the same date as a variable, writes the same.
    expected = tokenizer.apply_chat_template(
        asked("q"), tokenize=False, add_generation_prompt=True, date_string="04 Jul 2024"
    )
    assert prompt == expected


def test_a_date_that_is_asked_for_and_not_shown_is_no_matter(tiny_model: Path) -> None:
    shown_to_tools = "{% set d = strftime_now('%Y') %}{% if tools %}{{ d }}{% endif %}" + CHATML
    commented = "{# strftime_now #}" + CHATML
    expected = tokenize(load(tiny_model), pair("q")).sequences
    for template in (shown_to_tools, commented):
        assert tokenize(load(tiny_model, template), pair("q")).sequences.equals(expected)


@pytest.mark.parametrize("form", ["%Y", "%d", "%b", "%A", "%H:%M", "%S", "%y", "%j", "%p", "%U"])
def test_every_part_of_a_date_is_seen(tiny_model: Path, form: str) -> None:
    template = f"{{{{ strftime_now('{form}') }}}}" + CHATML
    with pytest.raises(ModelError, match="shows today's date"):
        Encoder(load(tiny_model, template), TokenizationConfig())


def test_a_date_shown_to_some_conversations_only_is_found_there(tiny_model: Path) -> None:
    """No conversation tried at the start sets it off; the first row that does ends the run."""
    template = "{% if 'today' in messages[0].content %}{{ strftime_now('%d') }}{% endif %}" + CHATML
    tokenizer = load(tiny_model, template)
    assert tokenize(tokenizer, pair("q")).pair_sequences.height == 1
    with pytest.raises(ModelError, match="shows today's date"):
        tokenize(tokenizer, pair("q"), pair("what is today?"))
    assert tokenize(tokenizer, pair("today?"), pinned_date="2024-07-04").sequences.height == 2


def test_a_template_that_draws_lots_draws_the_same(tiny_model: Path) -> None:
    template = "{{ range(99999) | random }}" + CHATML
    first, second = (
        tokenize(load(tiny_model, template), pair("q"), pair("r")).sequences for _ in range(2)
    )
    assert first.equals(second)
    assert first.height == 4
    tokenizer = load(tiny_model, template)
    drawn = {
        tokenizer.apply_chat_template(asked(), tokenize=False).partition("<")[0] for _ in range(5)
    }
    assert len(drawn) > 1, "the control"


# Begin of sequence


def test_a_doubled_begin_of_sequence_is_refused(tiny_model: Path) -> None:
    tokenizer = load(tiny_model, "{{ bos_token }}" + CHATML)
    tokenizer.bos_token = "<|endoftext|>"
    chosen, _ = sides(tokenize(tokenizer, pair("q")))
    assert chosen["prompt_ids"][:2] == [0, 1], "one is right"
    for template in (
        "{{ bos_token }}{{ bos_token }}" + CHATML,
        "<|endoftext|>{{ bos_token }}" + CHATML,
        CHATML + "{{ bos_token + bos_token }}",
    ):
        tokenizer.chat_template = template
        with pytest.raises(ModelError, match=r"'<\|endoftext\|>' twice in a row"):
            Encoder(tokenizer, TokenizationConfig())
    # One token that begins and ends: two of them part turns, and only a doubled begin is wrong.
    tokenizer.eos_token = tokenizer.bos_token
    turns = "{% for m in messages %}{{ bos_token + m.role + m.content + eos_token }}{% endfor %}"
    tokenizer.chat_template = turns
    assert tokenize(tokenizer, pair("q")).pair_sequences.height == 1
    tokenizer.chat_template = "{{ bos_token }}" + turns
    with pytest.raises(ModelError, match="twice in a row"):
        Encoder(tokenizer, TokenizationConfig())


def test_no_begin_of_sequence_is_added(tiny_model: Path, tmp_path: Path) -> None:
    """A tokeniser whose own post-processor adds one does not, to a rendered text."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = load(tiny_model, "{{ bos_token }}" + CHATML)
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer.save_pretrained(tmp_path)
    tokenizer = load(tmp_path, "{{ bos_token }}" + CHATML)
    assert tokenizer("x")["input_ids"][0] == 0, "the control: alone, it adds one"
    chosen, rejected = sides(tokenize(tokenizer, pair("q")))
    assert chosen["prompt_ids"][:2] == [0, 1]
    assert 0 not in chosen["completion_ids"] + rejected["completion_ids"]


def test_the_environment_changes_nothing(tiny_model: Path) -> None:
    """Another hash seed, time zone, locale: the same texts."""
    code = (
        "import hashlib, templates\n"
        "from pipeline.tokenization.rendering import Renderer\n"
        "r = Renderer(templates.MARKED, {'eos_token': '</s>'}, '2024-07-04')\n"
        "found = r.render(templates.conversations(20))\n"
        "print(hashlib.sha256(repr(found).encode()).hexdigest())\n"
    )
    path = os.pathsep.join([*sys.path, str(Path(__file__).parent)])
    seen = set()
    for changes in (
        {"PYTHONHASHSEED": "0"},
        {"PYTHONHASHSEED": "7", "TZ": "Pacific/Kiritimati", "LC_ALL": "C"},
    ):
        env = {**os.environ, "PYTHONPATH": path, **changes}
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
        )
        seen.add(done.stdout)
    assert len(seen) == 1

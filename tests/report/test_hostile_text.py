"""Hostile texts: what is in the data does nothing on the page, and is shown there."""

import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_tables import made, parsed, plain

from pipeline.report import render
from pipeline.report.text import visible

# What is in the data, and how the page must show it.
HOSTILE = [
    *(
        (text, text)
        for text in (
            "<script>alert(1)</script>",
            "</script><script>alert(1)</script>",
            "<!--<script",
            "--><b>x</b><!--",
            "<img src=x onerror=alert(1)>",
            "<svg/onload=alert(1)>",
            "<svg><script href='data:,alert(1)'/></svg>",
            "<a href='javascript:alert(1)'>x</a>",
            "javascript:alert(1)",
            "<iframe src='https://evil.example'></iframe>",
            "<link rel=stylesheet href=//evil.example/x.css>",
            "<meta http-equiv=refresh content='0;url=//evil.example'>",
            "<base href='https://evil.example/'>",
            "<form action='https://evil.example'><input></form>",
            "<object data='x'></object><embed src='x'>",
            "<style>*{display:none}</style>",
            "</style><script>alert(1)</script>",
            "</div></section></main></body></html>",
            "</title><script>alert(1)</script>",
            "</textarea><plaintext>",
            '" onmouseover="alert(1)" x="',
            "' onfocus='alert(1)' autofocus='",
            "{{ 7*7 }} {{ config }}",
            "{% for x in range(9) %}x{% endfor %}",
            "{# gone #}",
            "&lt;b&gt; &amp; &#60;script&#62; &nbsp",
            "<math><mi//xlink:href='data:x,<script>alert(1)</script>'>",
            '=HYPERLINK("http://evil.example")',
            "[x](javascript:alert(1)) ![y](http://evil.example/z.png)",
            "]]><![CDATA[ <b>",
            "url(http://evil.example) expression(alert(1))",
            "العربية עברית 日本語 👩‍👩‍👧 é",
        )
    ),
    ("\x1b[31mred\x1b[0m", "[U+001B][31mred[U+001B][0m"),
    ("a\u202egnp.exe\u202c", "a[U+202E]gnp.exe[U+202C]"),
    ("\u2066x\u2069\u200f\u061c", "[U+2066]x[U+2069][U+200F][U+061C]"),
    ("a\u2028b\u2029c", "a[U+2028]b[U+2029]c"),
    ("nul\x00bel\x07del\x7fc1\x9b", "nul[U+0000]bel[U+0007]del[U+007F]c1[U+009B]"),
    ("\ufeff\U000e0041\ufffe", "[U+FEFF][U+E0041][U+FFFE]"),
    ("cr\rx", "cr[U+000D]x"),
    ("x" * 1_000_000, "x" * 100),
]
FIELDS = """title,plan,objective,loss,loss value,source,file,category,pair source,role,system,user,
chosen,rejected,flag,pair file,lost file,rule,raw,detail,lost rule,lost detail,key,value"""
ELEMENTS = """html head meta title style body bdi header h1 h2 h3 h4 h5 p b ul li span nav a main
section div table caption thead tbody tfoot tr th td code figure figcaption details summary article
strong dl dt dd"""
SVG = "svg g path defs use text clipPath rect"


@pytest.mark.parametrize(("text", "shown"), HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_is_shown_and_does_nothing(text: str, shown: str) -> None:
    rendered = render(made(n=12, text=text, splits=("test",)))
    page = parsed(rendered.html)
    known = {*ELEMENTS.split(), *(f"{{http://www.w3.org/2000/svg}}{tag}" for tag in SVG.split())}
    assert {e.tag for e in page.iter()} <= known
    assert len(list(page.iter("style"))) == 1
    for element in page.iter():
        for name, value in element.attrib.items():
            assert not name.lower().startswith("on")
            assert "//" not in value
            assert "script" not in value.lower()
            if name.endswith(("href", "src", "action", "data")):
                assert value.startswith("#")
            assert value.replace("url(#", "").count("url(") == 0
    everything = plain(page)
    for field in FIELDS.replace("\n", "").split(","):
        # Of a long prompt the page shows the end.
        cut = len(text) > 1200 and field in {"system", "user"}
        assert (f"{shown}»" if cut else f"«{field}:{shown}") in everything, field
    assert len(rendered.html) < 3_000_000
    json.loads(rendered.json, parse_constant=pytest.fail)


def test_page_has_no_comment_or_processing_instruction() -> None:
    assert "<!--" not in render(made(text="<!-- x --><?php ?>")).html


@given(st.text())
def test_visible_text_holds_nothing_that_controls(text: str) -> None:
    found = visible(text)
    for character in found:
        assert character in "\n\t" or unicodedata.category(character) not in {"Cc", "Cs"}
        assert unicodedata.bidirectional(character) not in set(
            ["LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"]
        )
    if text.isascii() and text.isprintable():
        assert found == text

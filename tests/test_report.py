"""How reports show themselves: within a terminal, in a notebook, an issue and a browser, and as plain data."""

from __future__ import annotations

import html.parser
import json
import math
import re
import shutil
import subprocess
from dataclasses import replace

import pytest

import fx_quant
from fx_quant.diagnose.check import CheckReport, Error, SiteCheck
from fx_quant.errors import MissError
from fx_quant.layers.quantize_model import LeftWeight, QuantizeReport
from fx_quant.loading.checkpoint import LoadReport
from fx_quant.loading.prepare import LeftModule, PrepareReport, SwappedModule
from fx_quant.reasons import Kind, Unmet
from fx_quant.report import (
    CallReport,
    ExcerptReport,
    FloatReport,
    MissReport,
    PlanReport,
    RecognisedReport,
    Report,
    Reported,
    SiteReport,
    TimeReport,
    UnseenReport,
)
from fx_quant.scheme import Scheme
from tests.test_explain import TwoLayers, build_two_layers

BROWSER = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None)
INT8 = "int8 per_token (dynamic) x int8 per_channel"
UNMET = {
    "cpu_int8_amx": (Unmet(Kind.FEATURE, "needs amx, which x86_vnni has not", "amx"),),
    "cutlass_int8": (Unmet(Kind.PLATFORM, "needs cuda, target is cpu"),),
    "pytorch_int_mm": (),
}
PLANS = {mode: PlanReport("none", {}, ()) for mode in ("eager", "graph", "piecewise")}


def site(module, scheme=INT8, kernel="cpu_int8_vnni", **more):
    sizes = {"n": 4096, "k": 1024, "weight_bytes": 4096 * 1024}
    excerpt = ExcerptReport("%0: int8[4] = aten.mm(x0)", "%0: int8[4] = fx_quant.cpu_int8_vnni(x0)")
    facts = {"op": "aten.mm", "m": "4..", "out_dtype": "bfloat16", "padding": "none", "numerics": "exact"}
    fields = {**sizes, **facts, "quantize": "amax / 127", "unmet": UNMET, "plans": PLANS, "excerpt": excerpt} | more
    return SiteReport(module=module, source="model.py:7", scheme=scheme, kernel=kernel, **fields)


LAYERS = "model.language_model.decoder.layers"
REPORT = Report(
    "x86_vnni",
    (
        *(site(f"{LAYERS}.{i}.self_attn.qkv", time=TimeReport(2e-5, 4e-5, 0.25)) for i in range(3)),
        *(site(f"{LAYERS}.{i}.mlp.up") for i in range(3)),
        site("lm_head", "bfloat16 x int4 per_group(128)", "cpu_weight_only_int4_bf16", numerics="reassociated"),
    ),
    (
        MissReport(
            f"{LAYERS}.0.mlp.<down>",
            "model.py:9",
            "aten.mm",
            "mm_3",
            "the scale of b varies along k",
            ExcerptReport("x"),
        ),
    ),
    (RecognisedReport("vision.proj", "", "aten.mm", INT8, "4..", 8, 8, "nothing is faster", UNMET, 64),),
    unseen=(UnseenReport("expert", "Experts", False),),
    floats=(FloatReport("router", "Linear", 2**20),),
    call=CallReport(1e-3, 2e-3),
)
INFINITE = Error(0.0, math.inf, 0, 0)
REPORTS = [
    REPORT,
    REPORT.compare(replace(REPORT, sites=REPORT.sites[1:])),
    CheckReport((SiteCheck(f"{LAYERS}.0.mlp.up", "cpu_int8_vnni", "exact", INFINITE, 0.0),), REPORT.misses, INFINITE),
    PrepareReport(
        (SwappedModule(f"{LAYERS}.0.mlp.up", (), "torchao", "Linear", INT8, "exact", "", 7),),
        (LeftModule("a.b", (), "torchao", "Linear", INT8, "it must have no hooks"),),
        released=True,
    ),
    QuantizeReport(INT8, ("a", "b"), (LeftWeight(f"{LAYERS}.0.experts", "Experts", "it is no linear"),)),
    LoadReport({Scheme.parse(INT8): ("a", "b")}, ("lm_head",), ("c",), (), ("kv cache scales are left",)),
]


def names(report):
    return type(report).__name__


@pytest.mark.parametrize("report", REPORTS, ids=names)
@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_text_fits(report, width):
    assert max(map(len, report.to_text(width=width).splitlines())) <= width


@pytest.mark.parametrize("report", REPORTS, ids=names)
def test_every_report_has_the_one_interface(report, monkeypatch):
    assert isinstance(report, Reported)
    assert repr(report) == str(report) == report.to_text(width=80)
    assert str(report).startswith("fx_quant: ")
    monkeypatch.setenv("COLUMNS", "50")
    assert max(map(len, str(report).splitlines())) <= 50
    data = json.loads(report.to_json(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert data["summary"] == report.summary()
    assert report.to_markdown().startswith("**fx_quant:** ") and "\x1b" not in report.to_markdown()
    assert "fx_quant:" in report._repr_html_()
    assert well_formed(report._repr_html_()) and well_formed(report.to_html())


def test_numbers_that_json_has_not_are_texts():
    data = json.loads(REPORTS[2].to_json())
    assert data["sites"][0]["error"]["sqnr_db"] == "Infinity" == data["outputs"]["sqnr_db"]


def test_what_all_rows_agree_in_stands_above_them():
    text = REPORT.to_text(width=80)
    assert "int8 token dyn x int8 channel, cpu_int8_vnni, exact, m 4.., no padding" in text
    (row,) = [line for line in text.splitlines() if line.startswith("self_attn.qkv")]
    assert row.split() == ["self_attn.qkv", "3", "4096", "1024", "60", "120", "75%"]
    assert INT8 in REPORT.to_text(wide=True) and f"{LAYERS}.*.self_attn.qkv" in REPORT.to_text(wide=True)


def test_long_names_are_shortened_at_the_left_and_it_says_so():
    long = Report("x86", (site(f"{LAYERS}.0.a_very_long_module_name_indeed.and_another.projection"),), ())
    text = long.to_text(width=60)
    assert "...and_another.projection"[-12:] in text and "--wide" in text
    assert "--wide" not in long.to_text(width=200)


def test_a_report_survives_json_and_says_what_is_shared_once():
    assert Report.from_json(REPORT.to_json()) == REPORT
    assert len(json.loads(REPORT.to_json())["verdicts"]) == 1
    many = replace(REPORT, sites=tuple(site(f"{LAYERS}.{i}.mlp.up") for i in range(225)))
    assert len(many.to_json()) < 225 * 1024


def test_a_comparison_names_what_changed():
    first, *others = REPORT.sites
    after = replace(REPORT, sites=(replace(first, kernel="cpu_int8_amx"), *others[:-1]), misses=())
    comparison = REPORT.compare(after)
    assert comparison.summary() == "3 of 9 quantized matmuls differ"
    assert [(each.module, each.before, each.after) for each in comparison.changes] == [
        (f"{LAYERS}.0.self_attn.qkv", "cpu_int8_vnni (exact)", "cpu_int8_amx (exact)"),
        ("lm_head", "cpu_weight_only_int4_bf16 (reassociated)", ""),
        (f"{LAYERS}.0.mlp.<down>", "missed, the scale of b varies along k", ""),
    ]
    assert "not there" in str(comparison)
    assert REPORT.compare(REPORT).changes == ()


def test_raise_if_tells_of_misses_and_of_nothing_analysed():
    with pytest.raises(MissError, match="none missed, got: 7 of 9"):
        REPORT.raise_if()
    with pytest.raises(MissError, match="no quantized matmul found"):
        Report("x86", (), ()).raise_if()
    assert REPORT.raise_if(missed=False, fewer_than=7) is REPORT
    with pytest.raises(MissError, match="8 or more"):
        REPORT.raise_if(missed=False, fewer_than=8)


def test_markdown_means_itself():
    text = REPORT.to_markdown()
    assert "| `self_attn.qkv` |" in text
    assert r"mlp.\<down\>" in text and "<down>" not in text
    assert "<details><summary>not chosen</summary>" in text


def test_explain_shows_the_graph_before_and_after_and_where_the_proof_stops():
    model, (x,) = build_two_layers()
    report = fx_quant.explain(model, x)
    (found,), (miss,) = report.sites, report.misses
    assert "aten._int_mm" in found.excerpt.before and f"fx_quant.{found.kernel}(" in found.excerpt.after
    assert "aten._int_mm" not in found.excerpt.after
    assert miss.excerpt.before.endswith("<- the proof stops here") and not miss.excerpt.after
    assert found.weight_bytes == found.n * found.k
    deep = fx_quant.explain(Twice(), x)
    assert deep.sites[0].excerpt == deep.sites[1].excerpt


class Twice(TwoLayers):
    """Two layers alike."""

    def __init__(self):
        super().__init__()
        self.second = TwoLayers().first

    def forward(self, x):
        return self.first(x) + self.second(x)


# --- the page -----------------------------------------------------------------------------------------------------


class _Checker(html.parser.HTMLParser):
    """Whether each element that is opened is closed, and what the page asks of the network."""

    def __init__(self):
        super().__init__()
        self.open, self.wrong, self.asked = [], [], []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "input", "br", "hr"):
            self.open.append(tag)
        self.asked += [value for name, value in attrs if name in ("src", "href") and not value.startswith("#")]

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)


def well_formed(text):
    checker = _Checker()
    checker.feed(text)
    return not checker.open and not checker.wrong and not checker.asked


def test_the_page_has_misses_first_and_asks_the_network_for_nothing():
    page = REPORT.to_html()
    assert well_formed(page) and not re.search(r"https?://|url\(|@import", page)
    order = [page.index(f'id="{name}"') for name in ("missed", "unseen", "kernels", "model", "rewritten", "recognised")]
    assert order == sorted(order)
    assert "What to do: quantize with one scale for each row of the weight" in page
    assert "mlp.&lt;down&gt;" in page and "<down>" not in page


@pytest.fixture
def browse(tmp_path):
    """The document that a browser has made of the page, some lines of its own run last."""
    if BROWSER is None:
        pytest.skip("no Chromium is installed (apt-get install chromium-headless-shell)")

    def run(script="", size="1200,900", at=""):
        path = tmp_path / "report.html"
        path.write_text(REPORT.to_html().replace("</body>", f"<script>{script}</script></body>"))
        command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={size}", "--dump-dom"]
        out = subprocess.run([*command, f"file://{path}{at}"], check=True, capture_output=True, text=True, timeout=120)
        return re.search(r"<title>(.*)</title>", out.stdout)[1], out.stdout

    return run


def test_a_browser_opens_what_is_linked_finds_modules_and_fits_a_narrow_window(browse):
    title, _ = browse(
        """
        {
        const seen = [];
        const find = document.querySelector('.find');
        find.value = 'qkv'; find.dispatchEvent(new Event('input'));
        const names = () => [...document.querySelectorAll('.tree .leaf .name')].filter(e => e.checkVisibility()).map(e => e.textContent);
        seen.push(names().join('+'));
        find.value = 'missed'; find.dispatchEvent(new Event('input'));
        seen.push(names().join('+'));
        find.value = ''; find.dispatchEvent(new Event('input'));
        seen.push(names().length);
        seen.push(document.documentElement.scrollWidth <= innerWidth);
        const card = document.querySelector('#matmul-1');
        seen.push(card.open, document.activeElement === card.querySelector('summary'));
        const focusable = [...document.querySelectorAll('.tree a, .tree summary, .card summary, .find')];
        seen.push(focusable.every(e => e.tabIndex === 0));
        document.title = seen.join('|');
        }
        """,
        size="400,800",
        at="#matmul-1",
    )
    assert title == "self_attn.qkv+self_attn.qkv+self_attn.qkv|&lt;down&gt;|11|true|true|true|true"

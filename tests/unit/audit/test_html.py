"""The page: complete, self-contained, well-formed, and safe whatever texts a report holds."""

from __future__ import annotations

import itertools
import re
from html.parser import HTMLParser

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tempo.audit.attack import Curve, Figure, Finding, Panel
from tempo.audit.report import html
from tempo.audit.report.contents import CONTROL, Made, Report, Run

PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
VOID = {"meta", "img", "line", "rect", "circle", "path", "polyline"}


class Page(HTMLParser):
    """Elements of a page in order, checked to be nested properly."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag, self.getpos()

    def handle_data(self, data):
        if self._open and self._open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag == name]


def report(text: str = "net", scheme: str = "mix") -> Report:
    """One of everything, with ``text`` wherever a text can be."""
    share = Figure(name=f"share {text}", value=0.875, leaks=0.5, chance=0.004, ceiling=1.0, meaning=text)
    delta = Figure(name="delta error", value=1.25, leaks=0.8, higher_leaks=False, chance=1.0, ceiling=0.0)
    curve = Curve(
        title=f"Curve {text}",
        x_label="block size",
        y_label="delta error",
        x=[4, 8, 64],
        series={f"series {text}": [0.1, None, 1.0], "other": [0.2, 0.3]},
        leaks=0.8,
        higher_leaks=False,
        note=text,
    )
    panel = Panel(title=f"Images {text}", rows={f"original {text}": [PIXEL, PIXEL], "formed": [PIXEL, PIXEL]})
    findings = [
        Finding(
            attack=f"zero-patterns {text}",
            knows=[],
            tries=f"Matches. {text}",
            verdict="broken",
            worker=text,
            figures=[share, Figure(name="rows", value=0.25)],
            panels=[panel],
        ),
        Finding(
            attack="frames",
            knows=["base"],
            tries="Fits.",
            verdict="resisted",
            figures=[delta],
            curves=[curve],
            worker="b",
        ),
        Finding(attack="rank", knows=[], tries="Counts.", verdict="not applicable", reason=f"no zero rows {text}"),
        Finding(attack="guess", knows=["data"], tries="Guesses.", verdict="not scored", reason="no truth"),
    ]
    control = Finding(
        attack="frames",
        knows=[],
        tries="Fits.",
        verdict="broken",
        reason=f"red-team {text}",
        figures=[Figure(name="delta error", value=0.0625, leaks=0.8, higher_leaks=False)],
    )
    about = {"title": text, "scheme": scheme, "settings": {"mix_block": text}}
    return Report(
        runs=[
            Run(
                **about,
                base="public",
                drift=0.034,
                offloaded=0.9,
                facts=["architecture", "base", "data"],
                findings=findings,
            ),
            Run(**about, base="secret", facts=["architecture", "data"], findings=findings[:2]),
            Run(title="controls", scheme=CONTROL, settings={}, base="unknown", facts=[], findings=[control]),
        ],
        curves=[curve],
        command=f"tempo audit --run {text}",
        machine={"cpu": text, "date": "2026-11-24"},
        seconds=300,
    )


def test_all_that_was_found_is_on_the_page():
    page = Page(html.page(report()))
    for part in (
        *("0.875", "0.004", "1.25", "0.0625", "0.25"),  # figures, a floor, the control's
        *("broken", "resisted", "not applicable", "not scored"),
        *(
            "nothing",
            "architecture",
            "data distribution",
            "base checkpoint",
            "base + data distribution",
            "lies (active)",
        ),
        *("from a public checkpoint", "from secret initial weights", "no base to know", "3.4%", "90.0%"),
        *("no zero rows net", "no truth", "tempo audit --run net", "5 min", "2026-11-24", "mix_block"),
        "The one attack succeeded, zero-patterns net: share net 0.875",
        "The one attack failed, frames: delta error 1.25 (chance 1, in clear 0)",
        "Not tried, since this attacker lacks what they need: frames .",
        *("leaks below 0.8", "What an audit cannot show", "no proof"),
    ):
        assert part in page.text, part
    assert len(page.all("img")) == 8  # two runs show the panel
    assert len([a for a in page.all("svg") if a.get("class") == "chart"]) == 2


def test_a_scheme_is_summed_up_by_the_least_that_breaks_it():
    assert (
        "Broken by any worker, which need not know anything but what it received: zero-patterns"
        in Page(html.page(report())).text
    )
    runs = [
        Run(title="t", scheme="s", settings={}, base="unknown", facts=["base"], findings=report().runs[0].findings[1:2])
    ]
    assert "not a proof" in Page(html.page(Report(runs=runs))).text


def test_what_failed_with_less_is_said_too():
    base_only = report().runs[0].findings[1]
    blind = Finding(
        attack="blind", knows=[], tries="", verdict="resisted", figures=[Figure(name="f", value=0.1, leaks=0.5)]
    )
    broken = Figure(name="delta error", value=0.125, leaks=0.8, higher_leaks=False)
    findings = [blind, msgspec.structs.replace(base_only, verdict="broken", figures=[broken])]
    run = Run(title="t", scheme="s", settings={}, base="public", facts=["base"], findings=findings)
    assert (
        "Broken by a worker that knows the public checkpoint: frames, delta error 0.125. "
        "With less, 1 attempt was made and failed."
    ) in Page(html.page(Report(runs=[run]))).text


def test_nothing_is_fetched_and_nothing_runs():
    text = html.page(report())
    page = Page(text)
    assert not {tag for tag, _ in page.elements} & {"script", "link", "iframe", "object", "embed", "base", "form"}
    for _, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")]
        assert (attributes.get("href") or "#").startswith("#")
        assert (attributes.get("src") or "data:image/png;base64,").startswith("data:image/png;base64,")
    assert "url(" not in text
    assert "@import" not in text
    policy = next(a for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy["content"] == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</style></title><base href=//evil.example>",
    "{{ 7 * 7 }}{% raw %}",
    "javascript:alert(1)",
    "&lt;b&gt;",
    "a" * 3000,
    "",
]


def same_elements(text: str) -> None:
    plain, hostile = Page(html.page(report())), Page(html.page(report(text, text)))
    names = [tag for tag, _ in plain.elements]
    assert [tag for tag, _ in hostile.elements if tag != "p"] == [name for name in names if name != "p"]
    assert [sorted(a) for _, a in hostile.elements if a] == [sorted(a) for _, a in plain.elements if a]


@pytest.mark.parametrize("text", HOSTILE[:-1])
def test_texts_stay_texts(text):
    same_elements(text)
    assert re.sub(r"\s+", " ", text) in Page(html.page(report(text, text))).text


@settings(max_examples=25, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=40))
def test_any_text_stays_text(text):
    same_elements("x" + text)


@pytest.mark.parametrize("name", ["mix", "summary", "attacks", "curve 1"])
def test_every_link_has_a_place_to_go_to(name):
    page = Page(html.page(report(name, name)))
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    assert {a["href"] for a in page.all("a")} <= {f"#{i}" for i in ids}
    labels = [a["aria-labelledby"] for _, a in page.elements if "aria-labelledby" in a]
    assert set(labels) <= set(ids)


def test_a_screen_reader_finds_its_way():
    page = Page(html.page(report()))
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert len(page.all("caption")) == len(page.all("table"))
    assert all(a.get("alt") for a in page.all("img"))
    assert all(a.get("role") == "img" or a.get("aria-hidden") == "true" for a in page.all("svg"))
    assert all("scope" in a for a in page.all("th"))
    assert page.all("html")[0]["lang"] == "en-GB"


def test_runs_of_another_machine_say_so():
    made = Made(command="tempo audit --scheme split", machine={"cpu": "the other CPU"})
    whole = report(scheme="split")
    page = html.page(msgspec.structs.replace(whole, runs=[msgspec.structs.replace(whole.runs[0], made=made)]))
    assert "but split" in page
    assert "tempo audit --scheme split</code>: the other CPU" in page


def test_a_report_without_runs_is_a_page():
    assert "Summary" in Page(html.page(Report(runs=[]))).text


def test_gaps_and_what_is_not_finite_leave_curves_drawable():
    curve = Curve(
        title="t",
        x_label="x",
        y_label="y",
        x=[0.0, 1.0, 2.0, 3.0],
        series={"a": [None, float("nan"), 1.0, float("inf")], "flat": [0.0, 0.0, 0.0, 0.0], "none": []},
    )
    single = Curve(title="one", x_label="x", y_label="y", x=[5.0], series={"a": [-3.0]})
    text = html.page(Report(runs=[], curves=[curve, single]))
    page = Page(text)
    points = [a["points"] for a in page.all("polyline")]
    assert not [p for p in points if "nan" in p or "inf" in p]
    assert len([a for a in page.all("svg") if a.get("class") == "chart"]) == 2


@given(
    st.lists(st.floats(0.001, 1e6), min_size=1, max_size=12, unique=True),
    st.floats(-1e6, 1e6, allow_subnormal=False),
)
@settings(max_examples=50, deadline=None)
def test_every_point_is_inside_the_drawing(x, value):
    curve = Curve(title="t", x_label="x", y_label="y", x=sorted(x), series={"a": [value] * len(x)}, leaks=0.5)
    page = Page(html.page(Report(runs=[], curves=[curve])))
    (line, *_) = [a["points"] for a in page.all("polyline") if a["points"] != "1,6 33,6"]
    for point in line.split():
        across, down = map(float, point.split(","))
        assert 0 <= across <= 460
        assert 0 <= down <= 270

"""The audit's page in a real browser: headless Chromium, light and dark, from a telephone to a wide screen.

With TEMPO_SCREENSHOTS=FOLDER the pictures stay there, to be looked at.
"""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from tempo.audit import lab
from tempo.audit.attack import Curve, Figure, Finding, Panel
from tempo.audit.attacks.gram import Gram
from tempo.audit.controls import running
from tempo.audit.controls.weak import OneSided
from tempo.audit.knowledge import Knowledge
from tempo.audit.report import html
from tempo.audit.report.contents import Report, Run
from tempo.schemes import create

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WIDTHS = (360, 768, 1400)

if CHROMIUM is None and not os.environ.get("CI"):
    pytest.skip("needs Chromium (apt-get install chromium); under CI it must be there", allow_module_level=True)


class Browser:
    """Chromium, told what to do over its debugging pipe: messages of JSON that end with a zero byte."""

    def __init__(self, home: Path) -> None:
        assert CHROMIUM is not None, "CI is set, but there is no Chromium"
        commands, self._out = os.pipe()
        self._in, answers = os.pipe()
        self._process = subprocess.Popen(
            [
                *("bash", "-c", f'exec "$@" 3<&{commands} 4>&{answers}', "chromium", CHROMIUM),
                *("--headless=new", "--remote-debugging-pipe", f"--user-data-dir={home}", "--hide-scrollbars"),
                *("--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking"),
                *(["--no-sandbox"] if os.geteuid() == 0 else []),  # Chromium refuses to sandbox for root
                "about:blank",
            ],
            pass_fds=(commands, answers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(answers)
        self._read, self._number, self._session = b"", 0, ""
        self.events: list[dict[str, Any]] = []
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self._session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self(f"{domain}.enable")

    def __call__(self, method: str, **parameters: object) -> dict[str, Any]:
        """Call a method of the DevTools protocol."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            self.events.append(answer)
        assert "result" in answer, answer
        return answer["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._read:
            more = os.read(self._in, 1 << 16)
            assert more, "Chromium ended"
            self._read += more
        message, _, self._read = self._read.partition(b"\0")
        return json.loads(message)

    def open(self, file: Path, width: int, scheme: str) -> None:
        """Load a page as on a screen of ``width`` pixels whose user prefers ``scheme``."""
        self.events.clear()
        self("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=False)
        self("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self("Page.navigate", url=file.as_uri())
        while not self.named("Page.loadEventFired"):
            self.events.append(self._next())

    def named(self, *methods: str) -> list[dict[str, Any]]:
        """Events so far."""
        return [event["params"] for event in self.events if event.get("method") in methods]

    def evaluate(self, script: str) -> Any:
        """Run a script of the test's; the page's own policy allows none."""
        answer = self("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def picture(self, height: int) -> bytes:
        """The page as PNG, at most ``height`` pixels of it."""
        size = self("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": min(size["height"], height), "scale": 1}
        return base64.b64decode(self("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)["data"])

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
        os.close(self._out)
        os.close(self._in)


def picture(seed: int) -> str:
    noise = torch.rand(16, 16, 3, generator=torch.Generator().manual_seed(seed)).mul(255).byte().numpy()
    written = io.BytesIO()
    Image.fromarray(noise).save(written, "PNG")
    return base64.b64encode(written.getvalue()).decode()


def attacked(masks: Any) -> Finding:
    """What the attack on Gram matrices really finds under ``masks``."""
    with lab.open_lab(masks=masks) as opened:
        model = nn.Linear(64, 64)
        opened.session.protect(model, base="secret")
        model(torch.randn(64, 64) @ torch.randn(64, 64))
        return Gram().run(opened.views[0], Knowledge(), opened.truth())


def report() -> Report:
    """Real findings of one attack, and made-up ones with long names, many images and every kind of verdict."""
    curve = Curve(
        title="How large blocks must be",
        x_label="block size",
        y_label="delta error",
        x=[4, 8, 16, 32, 64, 128],
        series={f"a drift of {d} per cent of the norm": [0.1 * d, 0.2, None, 0.4, 0.9, 1.01] for d in (1, 2, 5)},
        leaks=0.8,
    )
    images = [picture(i) for i in range(16)]
    frames = Finding(
        attack="a-very-long-name-of-an-attack-that-fits-frames",
        knows=["architecture", "base"],
        tries="Fits frames.",
        verdict="resisted",
        figures=[
            Figure(
                name="delta error",
                value=1.01,
                leaks=0.8,
                higher_leaks=False,
                chance=1.0,
                ceiling=0.0,
                meaning="Words. " * 20,
            ),
            Figure(name="purity of a block's membership", value=0.1, chance=0.08, ceiling=1.0),
            Figure(name="PSNR", value=8.1),
        ],
        curves=[curve],
        panels=[Panel(title="Images", rows={"original": images, "formed by the worker": images}, note="The best.")],
        worker="tcp:[2001:0db8:85a3:0000:0000:8a2e:0370:7334]:7070@operator-with-a-name",
    )
    absent = Finding(attack="rank", knows=[], tries="Counts.", verdict="not applicable", reason="no row is zero " * 9)
    unscored = Finding(attack="guess", knows=["data"], tries="Guesses.", verdict="not scored", reason="no truth")
    runs = []
    for name, masks in (
        ("insecure-plain", create("insecure-plain")),
        ("one-sided", OneSided()),
        ("mix", create("mix")),
    ):
        about = {"scheme": name, "settings": {"placement": "all"}, "offloaded": 0.9}
        found, facts = [attacked(masks), absent, unscored], ["architecture", "data"]
        runs += [
            Run(title="vit on digits", base="public", facts=[*facts, "base"], findings=[*found, frames], **about),
            Run(title="resnet on a_data_set_with_a_name", base="secret", facts=facts, findings=found, **about),
        ]
    return Report(
        runs=[*runs, running.run(["gram"])],
        curves=[curve, curve],
        command="tempo audit --run /a/path/without/any/place/to/break/it/anywhere/examples/vit_cifar10.toml --html x",
        machine={"cpu": "a processor", "date": "2026-11-24"},
        seconds=60,
    )


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    opened = Browser(tmp_path_factory.mktemp("chromium"))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("report") / "report.html"
    file.write_text(html.page(report()), encoding="utf-8")
    return file


# Contrast as in WCAG 2.2, of every text against the nearest opaque background behind it.
LEAST_CONTRAST = """(() => {
  const numbers = colour => colour.match(/[\\d.]+/g).map(Number);
  const luminance = colour => numbers(colour).slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = element => {
    for (let e = element; e; e = e.parentElement) {
      const colour = getComputedStyle(e).backgroundColor;
      if ((numbers(colour)[3] ?? 1) === 1) return colour;
    }
  };
  let least = [99, ""];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim()) continue;
    const style = getComputedStyle(element);
    const colour = element instanceof SVGElement ? style.fill : style.color;
    const [low, high] = [luminance(colour), luminance(behind(element))].sort((a, b) => a - b);
    const contrast = (high + 0.05) / (low + 0.05);
    if (contrast < least[0]) least = [contrast, element.outerHTML.slice(0, 200)];
  }
  return least;
})()"""

# What sticks out of the screen. Rows of images and tables of numbers may: they scroll.
STICKING_OUT = """[...document.querySelectorAll("body *")].filter(e =>
  !e.closest(".images, details table, .sr") && e.getBoundingClientRect().right > innerWidth + 1
).map(e => e.outerHTML.slice(0, 120))"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_reads_well(browser: Browser, page: Path, width: int, scheme: str):
    browser.open(page, width, scheme)
    browser.evaluate("document.querySelectorAll('details').forEach(e => { e.open = true })")
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate(STICKING_OUT) == []
    contrast, where = browser.evaluate(LEAST_CONTRAST)
    assert contrast >= 4.5, where
    for kind, count in ("h1", 1), ("h2", 10), ("h3", 6), ("h4", 15), (".matrix .badge", 24), (".figures .gauge", 12):
        heights = browser.evaluate(
            f"[...document.querySelectorAll('{kind}')].map(e => e.getBoundingClientRect().height)"
        )
        assert len(heights) == count, kind
        assert min(heights) > 5, kind
    images = browser.evaluate("[...document.images].map(e => [e.naturalWidth, e.width])")
    assert images == [[16, 72]] * (3 * 32)
    charts = browser.evaluate("[...document.querySelectorAll('.chart')].map(e => e.getBoundingClientRect().width)")
    assert len(charts) == 3 + 2
    assert all(250 < drawn <= width for drawn in charts)
    assert browser.evaluate("[...document.querySelectorAll('polyline')].every(e => getComputedStyle(e).fill == 'none')")
    # Nothing complains, and nothing but the page itself is asked for.
    assert browser.named("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded") == []
    asked = {event["request"]["url"] for event in browser.named("Network.requestWillBeSent")}
    assert {url for url in asked if not url.startswith("data:")} == {page.as_uri()}
    folder = os.environ.get("TEMPO_SCREENSHOTS")
    shown = Image.open(io.BytesIO(browser.picture(16000 if folder else 1600)))
    assert shown.width == width
    if folder:
        shown.save(Path(folder) / f"report-{scheme}-{width}.png")
    brightness = shown.convert("L").resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))
    assert brightness < 80 if scheme == "dark" else brightness > 200

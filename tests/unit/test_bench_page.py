"""The evaluation's page as a browser shows it: nothing goes wrong, every figure is there, on a telephone and in the dark, too."""

from __future__ import annotations

import html
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from bench_records import whole

from podferry.bench.evaluation import html_report
from podferry.bench.evaluation.sections import sections
from podferry.node.process import run

pytestmark = pytest.mark.unit

PHONE, DESK = 360, 1280
DARK, LIGHT = 0, 1
"""PreferredColorScheme in Chromium's settings (third_party/blink, preferred_color_scheme.mojom)."""

# The page lies in frames of its own widths: a headless window cannot be as narrow as a telephone.
LOOK = """
<body><script>
const wide = WIDTHS, found = {errors: []}
let left = wide.length
for (const width of wide) {
  const frame = document.createElement("iframe")
  frame.style.cssText = `width:${width}px;height:800px;border:0`
  frame.onload = () => {
    const inner = frame.contentWindow, root = inner.document.documentElement
    inner.addEventListener("error", event => found.errors.push(event.message))
    found[width] = {
      scroll: root.scrollWidth, width: inner.innerWidth,
      background: inner.getComputedStyle(inner.document.body).backgroundColor,
      ink: inner.getComputedStyle(inner.document.querySelector("svg .name")).fill,
      cut: [...inner.document.querySelectorAll("svg text")].filter(one => {
        const box = one.getBBox(), whole = one.ownerSVGElement.viewBox.baseVal
        return box.x < 0 || box.x + box.width > whole.width
      }).map(one => one.textContent),
      figures: [...inner.document.querySelectorAll("figure")].filter(one => {
        const box = one.querySelector("svg").getBoundingClientRect()
        return box.width > 100 && box.height > 50 && box.right <= width
      }).map(one => one.id),
    }
    if (--left === 0) {
      const said = document.createElement("pre")
      said.id = "found"
      said.textContent = JSON.stringify(found)
      document.body.append(said)
    }
  }
  frame.srcdoc = PAGE
  document.body.append(frame)
}
</script></body>
"""


def browser() -> str:
    for name in ("chromium", "chromium-headless-shell", "google-chrome"):
        if path := shutil.which(name):
            return path
    pytest.skip("needs Chromium (apt-get install chromium)")


def looked_at(page: str, directory: Path, scheme: int) -> dict[str, Any]:
    """What the page looks like in Chromium, by width; fails where its console has an error."""
    quoted = json.dumps(page).replace("</", "<\\/")
    (directory / "look.html").write_text(LOOK.replace("WIDTHS", str([PHONE, DESK])).replace("PAGE", quoted))
    argv = [
        browser(),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--enable-logging=stderr",
    ]
    argv += [f"--user-data-dir={directory / 'profile'}", f"--blink-settings=preferredColorScheme={scheme}"]
    argv += ["--virtual-time-budget=5000", "--dump-dom", (directory / "look.html").as_uri()]
    done = run(argv, timeout=120)
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    said = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert said, done.stdout[-500:]
    found: dict[str, Any] = json.loads(html.unescape(said[1]))
    assert found["errors"] == []
    return found


def brightness(colour: str) -> float:
    return sum(float(part) for part in re.findall(r"[\d.]+", colour)[:3]) / 3


@pytest.mark.parametrize("scheme", [LIGHT, DARK], ids=["light", "dark"])
def test_the_page_in_a_browser(tmp_path: Path, scheme: int) -> None:
    records = whole(2)
    page = html_report.write(records, tmp_path, "podferry bench evaluate").read_text()
    seen = looked_at(page, tmp_path, scheme)
    expected = [figure.name for section in sections(records) for figure in section.figures]
    for width in (PHONE, DESK):
        one = seen[str(width)]
        assert one["figures"] == expected
        assert one["cut"] == [], "letters that are cut off at the edge"
        assert one["scroll"] <= one["width"] == width, "it must not scroll to the side"
        dark = brightness(one["background"]) < 64 and brightness(one["ink"]) > 192
        bright = brightness(one["background"]) > 192 and brightness(one["ink"]) < 64
        assert (dark, bright) == (scheme == DARK, scheme == LIGHT)


@pytest.mark.parametrize(
    "flaw",
    ['<script>console.error("no")</script>', "<script>missing()</script>", '<div style="width:900px">wide</div>'],
)
def test_the_look_finds_what_is_wrong(tmp_path: Path, flaw: str) -> None:
    page = (
        html_report.write(whole(1), tmp_path, "podferry bench evaluate")
        .read_text()
        .replace("</body>", f"{flaw}</body>")
    )
    with pytest.raises(AssertionError):
        seen = looked_at(page, tmp_path, LIGHT)
        assert seen[str(PHONE)]["scroll"] <= PHONE

"""The page in a browser: charts are drawn, the slider moves the pictures, nothing overflows, light and dark."""

import json
import re
import shutil
import subprocess

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium here")

PROBE = """<script>
addEventListener("load", () => setTimeout(() => {
  const slider = document.querySelector("input[type=range]"), now = () => document.querySelector("img.now").src;
  const last = now();
  slider.value = 0;
  slider.dispatchEvent(new Event("input"));
  const found = {
    ready: document.documentElement.dataset.ready,
    plots: document.querySelectorAll(".plot").length,
    canvases: [...document.querySelectorAll(".plot canvas")].filter((c) => {
      const pixels = c.getContext("2d").getImageData(0, 0, c.width, c.height).data;
      return pixels.some((value) => value !== 0);
    }).length,
    moved: now() !== last,
    isBefore: now() === document.querySelector("img.before").src,
    told: document.querySelector("output").textContent,
    width: innerWidth,
    needed: document.documentElement.scrollWidth,
    back: getComputedStyle(document.body).backgroundColor,
    text: getComputedStyle(document.body).color,
    values: [...document.querySelectorAll(".u-legend .u-value")].map((cell) => cell.textContent),
  };
  document.title = "FOUND" + JSON.stringify(found) + "END";
}, 300));
</script></body>"""


def look(page, folder, *options):
    """What the probe found in a page, and the browser's console."""
    probed = folder / "probed.html"
    probed.write_text(page.read_text().replace("</body>", PROBE))
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command += [f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=5000", *options, "--dump-dom"]
    done = subprocess.run([*command, probed.as_uri()], capture_output=True, text=True, timeout=900)
    found = re.search(r"<title>FOUND(.*?)END</title>", done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(found[1].replace("&amp;", "&")), console


def brightness(colour):
    return sum(map(int, re.findall(r"\d+", colour)[:3])) / 3


@pytest.mark.parametrize(("scheme", "size"), [("light", "1280,900"), ("dark", "1280,900"), ("light", "500,900")])
def test_the_page_works(trained, tmp_path, scheme, size):
    dark = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    found, console = look(trained / "report.html", tmp_path, f"--window-size={size}", *dark)
    assert found["ready"] == "true" and console == []
    assert found["canvases"] == found["plots"] >= 10, "every chart is drawn"
    assert found["moved"] and found["isBefore"] and found["told"] == "before training"
    assert found["needed"] <= found["width"], "nothing is wider than the window"
    assert (brightness(found["back"]) < brightness(found["text"])) is (scheme == "dark")
    assert all(found["values"]), "without a cursor the last values are shown"

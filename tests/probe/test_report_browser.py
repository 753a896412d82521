"""The page in a real browser, where there is one: Chromium without a window."""

import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from moestro.probe.measures.measure import measure
from moestro.probe.measures.saturation import saturation
from moestro.probe.report.page import Facts, build
from moestro.text import ByteTokenizer

from .changed import make_ablations
from .traces import make_trace

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
TEXT = (
    "</script><script>document.title='taken'</script><img src=x onerror=document.title='taken'> é"
)

# The page stands in a frame, since a window cannot be as narrow as a telephone.
FRAME = """<!doctype html><body style="margin:0">
<iframe id="f" src="page.html?theme=dark" style="border:0;width:WIDTHpx;height:900px"></iframe>
<script>
const seen = {};
const wait = () => new Promise((done) => setTimeout(done, 200));
const tell = () => { document.documentElement.dataset.seen = JSON.stringify(seen); };
addEventListener("unhandledrejection", (event) => { seen.error = `${event.reason}`; tell(); });
document.getElementById("f").addEventListener("load", async () => {
  const page = document.getElementById("f").contentDocument, root = page.documentElement;
  const key = (element, name) => element.dispatchEvent(
    new KeyboardEvent("keydown", { key: name, bubbles: true, cancelable: true }));
  await wait();
  seen.overflow = root.scrollWidth - root.clientWidth;
  seen.width = root.clientWidth;
  seen.title = page.title;
  seen.images = page.images.length;
  const charts = [...page.querySelectorAll("[data-chart]")];
  seen.charts = charts.map((one) => one.querySelectorAll("svg path").length);
  const layer = page.getElementById("layer");
  layer.value = "1"; layer.dispatchEvent(new Event("change"));
  await wait();
  seen.layer = page.querySelector("#domains [data-layer]").textContent;
  const map = page.querySelector("#load .draw");
  map.focus(); key(map, "ArrowRight"); key(map, "ArrowDown");
  seen.read = page.getElementById("load-read").textContent;
  key(map, "Enter");
  seen.expert = page.querySelector("#expert h3").textContent;
  page.querySelector("#cards [data-expert='2']").click();
  seen.chosen = page.querySelector("#cards [aria-checked=true]").dataset.expert;
  key(page.querySelector("#cards [aria-checked=true]"), "ArrowRight");
  seen.next = page.querySelector("#cards [aria-checked=true]").dataset.expert;
  const text = page.getElementById("text");
  seen.text = [...text.children].map((one) => one.textContent).join("");
  key(text.firstElementChild, "End");
  seen.token = page.getElementById("inspect").textContent;
  seen.tabs = text.querySelectorAll("[tabindex='0']").length;
  page.querySelector("#only button").click();
  seen.alone = text.querySelectorAll(".off").length;
  seen.dark = page.getElementById("theme").getAttribute("aria-pressed");
  page.getElementById("theme").click();
  seen.light = root.dataset.theme;
  await wait();
  seen.state = root.dataset.state;
  seen.after = root.scrollWidth - root.clientWidth;
  tell();
});
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no chromium here")
@pytest.mark.parametrize("width", [360])
def test_the_page_works(tmp_path, width):
    trace = make_trace(
        domains=("a-domain-with-quite-a-long-name" * 2, "prose"), documents=4, lengths=(60,),
        layers=3, experts=6, by_token=2.0, generated=5,
    )  # fmt: skip
    ids = np.resize(np.frombuffer(TEXT.encode(), np.uint8).astype(np.int32), 60)
    trace = trace._replace(tokens_T=np.tile(ids, len(trace.length_N)))
    page = build(
        measure(trace, draws=19),
        trace,
        ByteTokenizer(),
        facts=Facts(10**9, 10**8, 3),
        ablations=make_ablations(domains=trace.domains),
        saturation=saturation([trace, trace], [10, 20], draws=19),
    )
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    (tmp_path / "frame.html").write_text(FRAME.replace("WIDTH", str(width)))
    done = subprocess.run(
        [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
         "--window-size=1000,1000", f"--user-data-dir={tmp_path / 'profile'}",
         "--allow-file-access-from-files",
         "--virtual-time-budget=8000", "--dump-dom", (tmp_path / "frame.html").as_uri()],
        capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    found = re.search(r'data-seen="([^"]*)"', done.stdout)
    assert found, done.stderr[-2000:]
    seen = json.loads(html.unescape(found[1]))
    assert "error" not in seen, seen["error"]
    assert seen["state"] == "ready"
    assert seen["width"] == width
    assert seen["overflow"] == seen["after"] == 0
    assert seen["title"] == "tiny: inside its experts"
    assert seen["images"] == 0
    assert len(seen["charts"]) == 7
    assert min(seen["charts"]) > 0
    assert seen["layer"] == "1"
    assert seen["read"].startswith("Layer 1, expert 1:")
    assert seen["expert"] == "1 Expert 1 of layer 1"
    assert (seen["chosen"], seen["next"]) == ("2", "3")
    assert seen["text"].startswith("</script><script>")
    assert "token 60 of 60, layer 1, written by the model" in seen["token"]
    assert seen["tabs"] == 1
    assert seen["alone"] > 0
    assert (seen["dark"], seen["light"]) == ("true", "light")

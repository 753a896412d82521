"""The page at /: what it may load, and how it works in a real browser where there is one."""

import base64
import hashlib
import html
import json
import re
import shutil
import subprocess
import threading
from pathlib import Path

import httpx2 as httpx
import pytest
from starlette.responses import HTMLResponse
from starlette.routing import Route

from moestro.serve.running import bind, server
from moestro.serve.served import Served
from moestro.serve.settings import ServeSettings
from moestro.serve.state import new_state

from .serving import at_work, state_of
from .test_chat import HELLO, events, post

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")

# The page stands in a frame, since a window cannot be as narrow as a telephone.
FRAME = """<!doctype html><body style="margin:0">
<iframe id="f" src="/" style="border:0;width:360px;height:900px"></iframe>
<script>
const seen = {};
const tell = () => { document.documentElement.dataset.seen = JSON.stringify(seen); };
addEventListener("unhandledrejection", (event) => { seen.error = `${event.reason}`; tell(); });
const until = async (test) => {
  for (let n = 0; n < 400 && !test(); n += 1) await new Promise((done) => setTimeout(done, 50));
};
document.getElementById("f").addEventListener("load", async () => {
  const page = document.getElementById("f").contentDocument, root = page.documentElement;
  const $ = (id) => page.getElementById(id);
  const key = (element, name) => element.dispatchEvent(
    new KeyboardEvent("keydown", { key: name, bubbles: true, cancelable: true }));
  await until(() => root.dataset.state === "ready");
  seen.overflow = root.scrollWidth - root.clientWidth;
  seen.width = root.clientWidth;
  seen.title = page.title;
  seen.rows = page.querySelectorAll("#strip .layer").length;
  seen.cells = page.querySelectorAll("#strip i").length;
  $("key").value = "ключ";  // which no header takes as it is
  $("seed").value = "5"; $("max_tokens").value = "12";
  $("text").value = "Hello <img src=x onerror=document.title='taken'>";
  key($("text"), "Enter");
  await until(() => page.querySelector(".theirs .foot"));
  const box = page.querySelector(".theirs");
  seen.mine = page.querySelector(".mine").textContent;
  seen.images = page.images.length;
  seen.tokens = box.tokens.length;
  seen.text = [...box.querySelectorAll("span:not(.foot)")].map((one) => one.textContent).join("");
  seen.hues = box.querySelectorAll(".hue").length;
  seen.foot = box.querySelector(".foot").textContent;
  box.focus(); key(box, "ArrowRight"); key(box, "ArrowRight");
  seen.token = $("token").textContent;
  const before = box.querySelector(".hue").style.getPropertyValue("--h");
  $("layer").selectedIndex = 0; $("layer").dispatchEvent(new Event("change"));
  seen.experts = box.tokens.map((token) => token.experts);
  seen.first = [before, box.querySelector(".hue").style.getPropertyValue("--h")];
  await until(() => [...page.querySelectorAll("#strip i")].some((one) => one.title));
  seen.load = page.querySelector("#strip i").title;
  seen.theme = [root.dataset.theme];
  $("theme").click();
  seen.theme.push(root.dataset.theme);
  seen.again = $("token").textContent;
  $("temperature").value = "-1"; $("text").value = "again"; key($("text"), "Enter");
  await until(() => page.querySelector(".bad"));
  seen.bad = page.querySelector(".bad").textContent;
  seen.after = root.scrollWidth - root.clientWidth;
  $("temperature").value = "1"; $("max_tokens").value = "300"; $("text").value = "a long one";
  key($("text"), "Enter");
  $("reset").click();
  await until(() => $("go").textContent === "Send");
  $("max_tokens").value = "2"; $("text").value = "anew"; key($("text"), "Enter");
  await until(() => page.querySelector(".theirs .foot"));
  seen.anew = [...page.querySelectorAll(".turn")].length;
  tell();
});
</script>"""


@pytest.mark.parametrize("path", ["", "docs"])
def test_a_page_loads_nothing_from_elsewhere(address: str, path: str) -> None:
    response = httpx.get(f"{address}/{path}")
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert re.findall(r"\b(?:https?:)?//[\w.]+", response.text.replace("// ", "")) == []
    assert not re.search(r"\s(?:style|on\w+)=", response.text)  # the policy would not allow them


def test_every_route_is_described(address: str) -> None:
    described = httpx.get(f"{address}/openapi.json").json()
    schemas = described["components"]["schemas"]
    references = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(described)))
    assert references <= schemas.keys()
    page = httpx.get(f"{address}/docs").text
    for path, methods in described["paths"].items():
        ((method, told),) = methods.items()
        assert httpx.request(method, f"{address}{path.replace('{name}', 'tiny')}").status_code in (
            200,
            400,
        )
        assert f"{method.upper()} {path}" in page
        if method == "post":
            name = told["requestBody"]["content"]["application/json"]["schema"]["$ref"]
            for field in schemas[name.rpartition("/")[2]]["properties"]:
                assert f"<code>{field}</code>" in page
    assert described["paths"].keys() >= {"/v1/completions", "/v1/messages", "/health"}


def test_the_report_of_the_probe(served: Served, address: str) -> None:
    assert httpx.get(f"{address}/report").status_code == 404
    page = "<style>p{}</style><script>1</script><p style='a'>"
    with at_work(new_state(served, ServeSettings(), page)) as other:
        assert httpx.get(f"{other}/v1/models").json()["data"][0]["report"] == "/report"
        response = httpx.get(f"{other}/report")
        digest = base64.b64encode(hashlib.sha256(b"1").digest()).decode()
        assert (
            f"script-src 'sha256-{digest}'; style-src 'unsafe-inline'"
            in (response.headers["content-security-policy"])
        )
        assert response.headers["content-security-policy"].endswith("; sandbox allow-scripts")
        assert response.text == page


def test_a_stream_with_experts(address: str) -> None:
    options = {"include_experts": True}
    asked = {"seed": 5, "max_tokens": 8, "return_routed_experts": True}
    for path, prompt in (
        ("/v1/chat/completions", {"messages": HELLO}),
        ("/v1/completions", {"prompt": "Hello"}),
    ):
        chunks = events(post(address, path, **prompt, **asked, stream=True, stream_options=options))
        tokens = [c["choices"][0]["token"] for c in chunks if "token" in c["choices"][0]]
        whole = chunks[-1]["choices"][0]["routed_experts"]
        assert [each["experts"] for each in tokens if each["experts"]] == [
            [first for first, _ in token] for token in whole
        ]
        choices = [each["choices"][0] for each in chunks]
        said = "".join(c.get("text") or c.get("delta", {}).get("content") or "" for c in choices)
        assert "".join(token["text"] for token in tokens) == said


@pytest.mark.skipif(BROWSER is None, reason="no chromium here")
def test_the_page_works_at_the_width_of_a_telephone(served: Served, tmp_path: Path) -> None:
    bound, ready = bind("127.0.0.1", 0), threading.Event()
    loop = server(state_of(served), ready.set)
    loop.config.app.routes.append(Route("/frame", lambda _: HTMLResponse(FRAME)))  # type: ignore
    thread = threading.Thread(target=loop.run, args=([bound],))
    thread.start()
    try:
        assert ready.wait(30)
        done = subprocess.run(
            [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
             "--enable-logging=stderr",
             "--window-size=1000,1000", f"--user-data-dir={tmp_path / 'profile'}",
             "--virtual-time-budget=60000", "--dump-dom",
             f"http://127.0.0.1:{bound.getsockname()[1]}/frame"],
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
    finally:
        loop.should_exit = True
        thread.join(30)
    found = re.search(r'data-seen="([^"]*)"', done.stdout)
    assert found, done.stderr[-2000:]
    seen = json.loads(html.unescape(found[1]))
    assert "error" not in seen, seen["error"]
    assert (seen["width"], seen["overflow"], seen["after"]) == (360, 0, 0)
    assert seen["title"] == "tiny · moestro"
    assert (seen["rows"], seen["cells"]) == (2, 8)
    assert seen["mine"].startswith("Hello <img")
    assert seen["images"] == 0
    assert seen["text"]
    assert 1 <= seen["hues"] <= seen["tokens"] <= 12
    assert re.match(r"\d+ tokens, [\d.]+ tokens/s$", seen["foot"])
    assert re.search(r"layer 1 · experts \d \(0\.\d\d\), \d \(0\.\d\d\)$", seen["token"])
    hues = [f"{(expert * 137.508 + 20) % 360:g}" for expert in reversed(seen["experts"][0])]
    assert [f"{float(each):g}" for each in seen["first"]] == hues
    assert re.match(r"expert 0: \d+ tokens$", seen["load"])
    assert sorted(seen["theme"]) == ["dark", "light"]
    assert "layer 0 · " in seen["again"]
    assert "temperature = -1 is not allowed" in seen["bad"]
    assert seen["anew"] == 2
    told = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    # Advice on forms and the answer that was asked for above are no errors of the page.
    assert not [line for line in told if "[DOM]" not in line and "400 (Bad" not in line]

"""The documents are true: their code runs, links lead somewhere, commands and settings exist."""

import doctest
import importlib
import re
import runpy
import shlex
from pathlib import Path

import pytest

from moestro.cli.main import VERBS, main
from moestro.config import RunConfig
from moestro.settings import load_settings

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "moestro"
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
# Drawn from the demo's run. A figure that is listed here may be missing; nothing else may.
NOT_YET = {"docs/figures/demo-compare.png", "docs/figures/demo-domains.png"}
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


def short(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(path: Path, *languages: str) -> list[str]:
    return [code for language, code in FENCE.findall(path.read_text()) if language in languages]


def prose(path: Path) -> str:
    """The page without its fenced blocks."""
    return FENCE.sub("", path.read_text())


def anchors(path: Path) -> set[str]:
    """What a heading is linked by: lower case, no punctuation, dashes for spaces."""
    headings = re.findall(r"^#+ (.+)$", prose(path), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def run_examples(text: str, name: str, namespace: dict) -> None:
    """Run `>>>` lines and compare what they print."""
    test = doctest.DocTestParser().get_doctest(text, namespace, name, None, 0)
    failures: list[str] = []
    doctest.DocTestRunner(optionflags=FLAGS).run(test, out=failures.append, clear_globs=False)
    assert not failures, "".join(failures)
    namespace.update(test.globs)


def test_the_pages_are_found():
    names = {short(path) for path in PAGES}
    assert {"CONTRIBUTING.md", "docs/mixture-of-experts.md", "docs/settings.md"} <= names


@pytest.mark.parametrize("path", [p for p in PAGES if blocks(p, "python")], ids=short)
def test_python_blocks_run(path, tmp_path, monkeypatch):
    """Blocks of one page share their names; `>>>` lines must print what the page says."""
    monkeypatch.chdir(tmp_path)
    namespace: dict = {"__name__": "page"}
    for number, code in enumerate(blocks(path, "python"), 1):
        name = f"{short(path)}, python block {number}"
        if ">>>" in code:
            run_examples(code, name, namespace)
        else:
            exec(compile(code, name, "exec"), namespace)


def modules_with_examples() -> list[str]:
    sources = sorted((ROOT / "src").rglob("*.py"))
    found = [path for path in sources if re.search(r"^\s+>>> ", path.read_text(), re.MULTILINE)]
    return [".".join(path.relative_to(ROOT / "src").with_suffix("").parts) for path in found]


@pytest.mark.parametrize("name", modules_with_examples())
def test_docstring_examples(name):
    module = importlib.import_module(name)
    tests = [test for test in doctest.DocTestFinder().find(module) if test.examples]
    assert tests
    for test in tests:
        failures: list[str] = []
        doctest.DocTestRunner(optionflags=FLAGS).run(test, out=failures.append)
        assert not failures, "".join(failures)


@pytest.mark.parametrize("path", PAGES, ids=short)
def test_links_lead_somewhere(path):
    for text, target in re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", prose(path)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        if file.is_relative_to(ROOT) and short(file) in NOT_YET:
            continue
        assert file.exists(), f"[{text}]({target}) does not exist"
        if anchor:
            assert anchor in anchors(file), f"no heading #{anchor} in {short(file)}"


def test_what_is_missing_is_still_linked():
    links = {
        short((path.parent / target).resolve())
        for path in PAGES
        for target in re.findall(r"!\[[^\]]*\]\(([^):]+)\)", prose(path))
    }
    assert links >= NOT_YET, "take what is no longer linked off the list"


def commands(path: Path) -> list[list[str]]:
    """The words after `moestro` in fenced blocks without a language or with a shell's, and inline.

    A fenced line counts if it starts with the command (a prompt, a path or variables before it
    allowed), so that its output does not.
    """
    text = "\n".join(blocks(path, "", "sh", "bash", "console", "shell", "text"))
    lines = text.replace("\\\n", " ").splitlines()
    lines += re.findall(r"`([^`\n]+)`", prose(path))
    start = re.compile(r"^\s*(?:\$ )?(?:[A-Z_]+=\S+ )*(?:\S*bin/)?moestro (?=[a-z-])(.+)$")
    found = [match[1] for match in map(start.match, lines) if match]
    return [shlex.split(line.split(" | ")[0], comments=True) for line in found]


ALL_COMMANDS = [(short(path), words) for path in PAGES for words in commands(path)]


@pytest.mark.parametrize(("page", "words"), ALL_COMMANDS, ids=lambda value: str(value)[:60])
def test_commands_exist(page, words, capsys):
    """The verb is one, and each option is in its help."""
    verb, *rest = words
    if verb.startswith("-"):
        verb, rest = None, words
    assert verb is None or verb in VERBS, f"{page}: moestro {verb}"
    assert main([*([verb] if verb else []), "--help"]) == 0
    known = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", capsys.readouterr().out))
    for option in (word.partition("=")[0] for word in rest if re.match(r"--?[a-z]", word)):
        assert option in known, f"{page}: moestro {verb} has no {option}"


@pytest.mark.parametrize(("page", "words"), ALL_COMMANDS, ids=lambda value: str(value)[:60])
def test_settings_in_commands_exist(page, words):
    given = [words[i + 1] for i, word in enumerate(words[:-1]) if word == "--set"]
    given = [
        value for value in given if value != "NAME=VALUE" and "router.kind=cosine" not in value
    ]
    load_settings(RunConfig, ROOT / "src" / "moestro" / "demo.toml", given)


@pytest.mark.parametrize("path", PAGES, ids=short)
def test_make_verbs_exist(path):
    makefile = (ROOT / "Makefile").read_text()
    verbs = set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))
    code = "\n".join(
        [*blocks(path, "", "sh", "bash", "console"), *re.findall("`[^`]+`", prose(path))]
    )
    used = set(re.findall(r"(?:^|[`$] ?)make ([a-z-]+)", code, flags=re.MULTILINE))
    assert used <= verbs, f"no such verb in the Makefile: {sorted(used - verbs)}"


def test_settings_page_is_fresh():
    made = runpy.run_path(str(ROOT / "docs" / "settings.py"))["page"]()
    assert (ROOT / "docs" / "settings.md").read_text() == made, "run: python docs/settings.py"


def test_settings_page_says_each_setting_once():
    """A meaning that the page's own list still has for a setting that is gone is stale."""
    script = runpy.run_path(str(ROOT / "docs" / "settings.py"))
    classes = [RunConfig, *(kind for _, kind, _ in script["tables"](RunConfig, ""))]
    bare = {
        f"{kind.__name__}.{name}"
        for kind in classes
        for name, field in kind.model_fields.items()
        if not script["settings_classes"](field.annotation) and not field.description
    }
    tags = {f"{kind.__name__}.kind" for kind in classes if kind.__name__ != "RouterConfig"}
    assert set(script["MEANINGS"]) == bare - tags


def test_figures_are_drawn_from_what_the_package_counts():
    """Of the models in the bar chart, those our decoder can express are counted by it."""
    from moestro import ModelConfig
    from moestro.models.count import count

    draw = runpy.run_path(str(ROOT / "docs" / "figures" / "draw.py"))
    shapes = {
        "Mixtral-8x7B (8, 2)": ModelConfig(
            vocab_size=32_000,
            dim=4096,
            num_layers=32,
            attention={"num_heads": 32, "num_kv_heads": 8},
            moe={"hidden_dim": 14_336, "num_experts": 8, "top_k": 2},
            head={"tied": False},
        ),
        "Qwen3-30B-A3B (128, 8)": ModelConfig(
            vocab_size=151_936,
            dim=2048,
            num_layers=48,
            attention={"num_heads": 32, "num_kv_heads": 4, "head_dim": 128, "qk_norm": "head"},
            moe={"hidden_dim": 768, "num_experts": 128, "top_k": 8},
            head={"tied": False},
        ),
    }
    for name, cfg in shapes.items():
        assert draw["MODELS"][name] == (count(cfg).total, count(cfg).active)


def test_balance_figure_shows_what_its_caption_says():
    simulate = runpy.run_path(str(ROOT / "docs" / "figures" / "draw.py"))["simulate"]
    counts, history = simulate(0.0, steps=60)
    assert counts[0] == max(counts) > 3 * sum(counts) / 8
    assert min(history) > 3
    _, history = simulate(5e-3)
    assert history[0] > 3
    assert sum(history[-50:]) / 50 < 1.2


@pytest.mark.parametrize("path", sorted(ROOT.glob("docs/figures/*.png")), ids=short)
def test_figures_are_small(path):
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size < 150_000


def test_what_the_architecture_names_exists():
    """Every `path.py:name` of docs/architecture.md, and every file."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    named = re.findall(r"`([\w/]+\.(?:py|cpp))(?::(\w+))?`", text)
    assert len(named) > 30
    for path, name in named:
        file = ROOT / path if path.startswith(("native/", "tests/")) else SOURCE / path
        assert file.is_file(), path
        found = re.search(rf"^(class|def) {name}\b", file.read_text(), flags=re.MULTILINE)
        assert not name or found, f"{path} has no {name}"

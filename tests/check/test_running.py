"""Subjects of all kinds, the command line, several processes, and what is refused."""

import json
from xml.etree import ElementTree

import pytest

from moestro.check import Description, ExpertNames, RouterRule, check
from moestro.cli.main import main
from moestro.errors import ConfigError, MoestroError

from .made import adapted, doubled, ours
from .plain_layer import SHAPES, factory

MADE = "tests.check.made"


@pytest.mark.parametrize("backend", ["reference", "segments", "auto"])
def test_our_own_backends_are_not_accused(backend):
    layer = ours()
    layer.experts.backend = backend
    report = check(layer)
    assert report.exit_code == 0, report.text()


def test_adapters_of_our_own_are_not_accused():
    report = check(adapted())
    assert report.exit_code == 0, report.text()
    done = {each.check for each in report.found if each.finding.outcome == "ok"}
    assert done >= {"adapter-outputs", "adapter-gradients", "adapter-merge", "adapter-frozen"}


@pytest.mark.parametrize("implementation", ["batched_mm", "moestro"])
@pytest.mark.parametrize("family", ["MixtralForCausalLM", "DeepseekV3ForCausalLM"])
def test_families_of_transformers_are_not_accused(family, implementation):
    pytest.importorskip("transformers")
    from moestro.check.foreign_models import subjects

    from ..probe import foreign_zoo as zoo

    (subject,) = subjects(zoo.build(family), implementation)
    report = check(subject)
    assert report.exit_code == 0, report.text()


def test_the_command_line_reports_and_says_so_by_its_code(capsys, tmp_path):
    file = tmp_path / "report.xml"
    arguments = ["check", f"{MADE}:doubled", "--only", "outputs", "--only", "expert-gradients"]
    assert main([*arguments, "--json", "--junit", str(file)]) == 1
    (report,) = json.loads(capsys.readouterr().out)
    outcomes = {row["check"]: row["outcome"] for row in report["checks"]}
    assert outcomes == {"outputs": "ok", "expert-gradients": "wrong"}
    assert "all of it is 2 times" in report["checks"][1]["words"]
    assert ElementTree.parse(file).find("testsuite").get("failures") == "1"
    assert main([*arguments, "--skip", "expert-gradients"]) == 0
    assert main(["check", "--list"]) == 0
    assert "expert-gradients: The gradient of every expert" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([f"{MADE}:raises"], "raised KeyError"),
        ([f"{MADE}:nothing"], "cannot import"),
        (["missing.json"], "there is no missing.json"),
        ([f"{MADE}:clean", "--only", "output"], "did you mean outputs?"),
        ([], "give what to check"),
    ],
)
def test_bad_input_is_one_sentence(arguments, words, capsys):
    assert main(["check", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_a_description_that_does_not_fit_is_refused():
    layer, about = factory(SHAPES["mixtral"])()
    names = about.experts.model_dump()
    for experts, words in (({"down": "none"}, "no parameter none"), ({"down": "ups"}, "are")):
        wrong = about.model_copy(update={"experts": ExpertNames(**{**names, **experts})})
        with pytest.raises(ConfigError, match=words):
            check((layer, wrong))
    with pytest.raises(ConfigError, match="gate_up"):
        Description(router=RouterRule(top_k=2), experts=ExpertNames(down="downs"))
    with pytest.raises(MoestroError, match="cannot check a int"):
        check(3)


def test_a_defect_is_told_from_what_follows_of_it():
    assert check(doubled).wrong == ["expert-gradients"]

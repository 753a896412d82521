"""Subjects of all kinds, the command line, several processes, and what is refused."""

import json
from dataclasses import replace
from xml.etree import ElementTree

import pytest
import torch

from moestro.check import Description, ExpertNames, RouterRule, check
from moestro.check.targets import of_moe
from moestro.checkpoints.gguf.writing import write_gguf
from moestro.cli.main import main
from moestro.config import ModelConfig
from moestro.errors import ConfigError, MoestroError
from moestro.files import write_json
from moestro.models.decoder import Decoder

from .made import adapted, doubled, ours
from .plain_layer import SHAPES, PlainLayer, describe, factory

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
        ([f"{MADE}:nothing"], "has no function 'nothing'"),
        (["tests.check.none:made"], "cannot import 'tests.check.none'"),
        ([f"{MADE}:ours", "--implementation", "eager"], "is to compute transformers' experts"),
        (["missing.json"], "there is no missing.json"),
        ([f"{MADE}:clean", "--only", "output"], "did you mean outputs?"),
        ([f"{MADE}:clean", "--only", "outputs", "--skip", "outputs"], "no check is left"),
        ([f"{MADE}:clean", "--junit", "no/such/folder.xml"], "cannot write --junit no/such/"),
        ([f"{MADE}:clean", "--junit", "."], "cannot write --junit ."),
        ([], "give what to check"),
        ([f"{MADE}:clean", "--seed", str(2**63)], "--seed"),
        ([f"{MADE}:clean", "--seed", "-1"], "--seed"),
    ],
)
def test_bad_input_is_one_sentence(arguments, words, capsys):
    assert main(["check", *arguments]) == 2
    assert words in capsys.readouterr().err


@pytest.fixture
def places(tmp_path):
    """Names of a mixture's settings: a run and its checkpoint, a GGUF file and its folder."""
    cfg = ModelConfig(dim=32, num_layers=1, moe={"hidden_dim": 32, "num_experts": 4, "top_k": 2})
    step = tmp_path / "run" / "checkpoints" / "step-000001"
    step.mkdir(parents=True)
    write_json(step / "config.json", cfg.model_dump(mode="json"))
    write_json(tmp_path / "run" / "config.json", {"model": cfg.model_dump(mode="json")})
    (tmp_path / "gguf").mkdir()
    file = tmp_path / "gguf" / "tiny.gguf"
    untied = cfg.model_copy(update={"head": cfg.head.model_copy(update={"tied": False})})
    write_gguf(Decoder(untied), file, family="mixtral", kind="bf16")
    return {
        "run": tmp_path / "run", "settings of a run": tmp_path / "run" / "config.json",
        "checkpoint": step, "GGUF": file, "folder of GGUF": file.parent,
    }  # fmt: skip


@pytest.mark.parametrize(
    "name", ["run", "settings of a run", "checkpoint", "GGUF", "folder of GGUF"]
)
def test_whatever_says_what_a_model_is_can_be_checked(name, places, capsys):
    pytest.importorskip("transformers")
    assert main(["check", str(places[name]), "--only", "outputs", "--json"]) == 0
    (report,) = json.loads(capsys.readouterr().out)
    assert [row["outcome"] for row in report["checks"]] == ["ok"]


def test_a_run_without_settings_of_its_own_is_checked_by_its_newest_checkpoint(places, capsys):
    pytest.importorskip("transformers")
    (places["run"] / "config.json").unlink()
    assert main(["check", str(places["run"]), "--only", "outputs", "--json"]) == 0
    assert "step-000001" in json.loads(capsys.readouterr().out)[0]["title"]


def test_weights_are_no_settings(tmp_path, capsys):
    pytest.importorskip("transformers")
    (tmp_path / "model.safetensors").write_bytes(b"\x80" * 16)
    for verb in ("check", "plan"):
        assert main([verb, str(tmp_path / "model.safetensors")]) == 2
        assert "model.safetensors is no file of settings; give" in capsys.readouterr().err


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


@pytest.mark.parametrize(
    ("top_k", "top_groups", "words"),
    [(3, 1, "hold 2"), (5, 2, "hold 4"), (2, 5, "give at most num_groups"), (9, 4, "do not fit")],
)
def test_more_experts_than_the_top_groups_hold_are_refused(top_k, top_groups, words):
    layer, about = factory(SHAPES["deepseek"])()
    rule = about.router.model_dump() | {"num_groups": 4, "top_k": top_k, "top_groups": top_groups}
    with pytest.raises(ConfigError, match=words):
        check((layer, about.model_copy(update={"router": RouterRule(**rule)})), only=["outputs"])


@pytest.mark.parametrize("error", [IndexError, ValueError])
def test_a_definition_that_cannot_run_is_one_sentence(error):
    def define(*_):
        raise error("no such expert")

    subject = replace(of_moe(ours()), define=define)
    with pytest.raises(MoestroError, match=r"its definition cannot run \(no such expert\)"):
        check(subject, only=["outputs"])


def test_a_layer_with_fixed_groups_has_no_other_number_of_experts():
    def make(dim=16, hidden_dim=8, num_experts=8, top_k=3):
        shape = SHAPES["deepseek"]._replace(
            dim=dim, hidden_dim=hidden_dim, num_experts=num_experts, top_k=top_k
        )
        torch.manual_seed(0)
        return PlainLayer(shape), describe(shape)

    report = check(make, only=["odd-widths", "all-experts", "single-expert"])
    assert [each.finding.outcome for each in report.found] == ["ok", "skipped", "skipped"]
    assert "its groups of experts have no such size" in report.found[1].finding.words


@pytest.mark.parametrize("name", ["run", "checkpoint"])
def test_an_implementation_of_transformers_is_refused_for_models_of_our_own(name, places, capsys):
    pytest.importorskip("transformers")
    for given in ("grouped_mm", "none", "eager"):
        assert main(["check", str(places[name]), "--implementation", given]) == 2
        assert f"{given} is to compute transformers' experts" in capsys.readouterr().err


def test_a_title_is_the_report_s_whatever_is_given(places):
    pytest.importorskip("transformers")
    targets = (of_moe(ours()), ours(), f"{MADE}:ours", str(places["run"]), doubled)
    for target in targets:
        assert check(target, only=["outputs"], title="mine").title == "mine"
    assert "mine" in check(str(places["GGUF"]), only=["outputs"], title="mine").title


def test_a_report_is_right_only_where_all_could_be_checked():
    lost = replace(of_moe(ours()), unreached="it was not reached")
    report = check(lost, only=["outputs", "choice"])
    assert (report.ok, report.wrong, report.exit_code) == (False, [], 3)
    assert report.unchecked == ["outputs", "choice"]
    assert report.text().splitlines()[1:] == [
        f"{name} could not be done: it was not reached" for name in report.unchecked
    ]
    assert "0 wrong, 2 could not be done" in report.text()
    assert report.as_json()["ok"] is False
    clean = check(ours(), only=["outputs", "adapter-merge"])  # one right, one does not apply
    assert clean.ok
    assert "could not" not in clean.text()


class Scaled(PlainLayer):
    """Its scale of weights is a tensor of one number, as a parameter or a buffer."""

    def __init__(self, shape, keep):
        super().__init__(shape)
        keep(self, torch.tensor(shape.scale))

    def weigh(self, scores_TE, experts_TK, logits_TE):
        weights_TK = scores_TE.gather(1, experts_TK)
        return weights_TK / weights_TK.sum(1, keepdim=True) * self.factor


def test_a_number_in_the_state_is_saved_and_one_that_is_not_is_named():
    def parameter(layer, number):
        layer.factor = torch.nn.Parameter(number, requires_grad=False)

    def buffer(layer, number):
        layer.register_buffer("factor", number)

    def constant(layer, number):
        layer.register_buffer("factor", number, persistent=False)
        layer.register_buffer("unused", number.clone(), persistent=False)

    shape = SHAPES["deepseek"]
    for keep, outcome in ((parameter, "ok"), (buffer, "ok"), (constant, "wrong")):
        torch.manual_seed(0)
        report = check((Scaled(shape, keep), describe(shape)), only=["outputs", "save-load"])
        assert [each.finding.outcome for each in report.found] == ["ok", outcome], keep
    assert report.found[1].finding.words.endswith("output: 'factor' is not in it")


def test_a_defect_is_told_from_what_follows_of_it():
    assert check(doubled).wrong == ["expert-gradients"]


def test_settings_and_models_are_targets_themselves():
    """The same name on the command line, settings, and a model that they make."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_local_experts": 4, "num_hidden_layers": 1, "vocab_size": 50}
    settings = transformers.MixtralConfig(
        **sizes, num_attention_heads=2, num_key_value_heads=1, intermediate_size=8, head_dim=8
    )
    some = ["outputs", "model-balance", "model-balance-mask", "model-loss", "model-balance-state"]
    report = check(settings, only=some, implementation="grouped_mm")
    assert [each.finding.outcome for each in report.found] == ["ok"] * len(some)
    assert "grouped_mm" in report.title
    model = transformers.MixtralForCausalLM(settings).eval()
    assert check(model, only=some).exit_code == 0
    assert all(each.grad is None for each in model.parameters())  # it is left as it was


def test_a_model_whose_loss_supposes_another_choice_is_told(monkeypatch):
    """transformers#45120 once more, and a loss that is multiplied by another coefficient."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.mixtral import modeling_mixtral as modeling

    settings = transformers.MixtralConfig(
        hidden_size=16, num_local_experts=4, num_hidden_layers=1, vocab_size=50,
        num_attention_heads=2, num_key_value_heads=1, intermediate_size=8, head_dim=8,
    )  # fmt: skip
    model = modeling.MixtralForCausalLM(settings).eval()
    plain = modeling.load_balancing_loss_func

    def softmax_twice(logits, *rest):
        return plain(tuple(each.softmax(-1) for each in logits), *rest)

    def unmasked(logits, num_experts, top_k, mask):
        return plain(logits, num_experts, top_k, None)

    model.router_aux_loss_coef *= 2
    for function, name, words in (
        (plain, "model-loss", ""),
        (softmax_twice, "model-balance", "softmax of softmax"),
        (unmasked, "model-balance-mask", "padding is counted"),
        (lambda *rest: plain(*rest).detach(), "model-balance", "no gradient"),
    ):
        monkeypatch.setattr(modeling, "load_balancing_loss_func", function)
        (explained,) = check(model, only=[name]).found
        assert explained.finding.outcome == "wrong"
        assert words in explained.finding.words


@pytest.mark.parametrize("frozen", ["bias", "router"])
def test_a_model_s_frozen_tensors_are_not_accused(frozen):
    """Ernie's bias never has a gradient; K = E, so that its loss counts the right experts."""
    transformers = pytest.importorskip("transformers")
    settings = transformers.Ernie4_5_MoeConfig(
        hidden_size=16, moe_num_experts=4, moe_k=4, num_hidden_layers=2, vocab_size=50,
        num_attention_heads=2, num_key_value_heads=1, intermediate_size=8, head_dim=8,
        moe_intermediate_size=8, moe_layer_start_index=0, moe_num_shared_experts=0,
    )  # fmt: skip
    model = transformers.Ernie4_5_MoeForCausalLM(settings)
    if frozen == "router":
        for name, each in model.named_parameters():
            each.requires_grad_(".gate." not in name)
    assert check(model, only=["model-balance"]).ok


def test_our_own_settings_and_models_are_targets(tmp_path):
    cfg = {"dim": 32, "num_layers": 1, "moe": {"hidden_dim": 8, "num_experts": 4, "top_k": 2}}
    some = ["outputs", "expert-gradients"]
    model = Decoder(ModelConfig(**{**cfg, "num_layers": 2}))
    report = check(model, only=some)
    assert [each.finding.outcome for each in report.found] == ["ok"] * 2
    with torch.no_grad():
        model.mixtures()[0].router.weight += float("nan")
    assert check(model, only=some).wrong == some
    with pytest.raises(MoestroError, match="is dense"):
        check(Decoder(ModelConfig(**{**cfg, "moe": None})))
    (tmp_path / "config.json").write_text(ModelConfig(**cfg).model_dump_json())
    assert check(str(tmp_path), only=["outputs", "expert-gradients"]).exit_code == 0


def test_an_implementation_of_ones_own_is_imported_and_checked(tmp_path, monkeypatch, capsys):
    transformers = pytest.importorskip("transformers")
    settings = transformers.MixtralConfig(num_local_experts=4, num_hidden_layers=1)
    (tmp_path / "config.json").write_text(settings.to_json_string())
    (tmp_path / "kernels_of_mine.py").write_text(
        "from transformers.integrations import moe\n\n\n"
        "def twice(*given):\n"
        "    return 2 * moe.batched_mm_experts_forward(*given)\n\n\n"
        'moe.ALL_EXPERTS_FUNCTIONS.register("twice", twice)\n'
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    arguments = [str(tmp_path), "--only", "outputs", "--only", "z-loss", "--implementation"]
    assert main(["check", *arguments, "kernels_of_mine:twice"]) == 1
    said = capsys.readouterr().out
    assert "all of it is 2 times" in " ".join(said.split())
    assert "z-loss: no z-loss is described" in said
    assert "1 wrong, 1 not applicable" in said
    assert main(["check", *arguments, "none_of_mine:twice"]) == 2


def test_a_model_that_cannot_be_built_is_unchecked_and_one_without_a_loss_is_skipped(monkeypatch):
    transformers = pytest.importorskip("transformers")
    from moestro.check.foreign_settings import NARROW, of_settings

    sizes = {"num_hidden_layers": 1, "num_local_experts": 4}
    (subject,) = of_settings(transformers.MixtralConfig(**sizes))
    monkeypatch.setitem(NARROW, "num_key_value_heads", 3)  # which 4 heads cannot share
    (lost,) = of_settings(transformers.MixtralConfig(**sizes))
    assert subject.whole is not None
    assert lost.whole is None
    report = check(lost, only=["outputs", "model-loss"])
    assert report.exit_code == 3
    assert "a narrow model of these settings does not run" in report.found[1].finding.words
    (without,) = of_settings(transformers.DeepseekV3Config(**{"num_hidden_layers": 4}))
    report = check(without, only=["model-loss"])
    assert report.exit_code == 0
    assert report.found[0].finding.outcome == "skipped"


def test_of_several_targets_one_that_cannot_be_run_does_not_end_the_report(capsys):
    assert main(["check", f"{MADE}:flat", f"{MADE}:clean", "--only", "outputs", "--json"]) == 3
    first, second = json.loads(capsys.readouterr().out)
    assert first["checks"][0]["outcome"] == "unchecked"
    assert second["checks"][0]["outcome"] == "ok"
    assert main(["check", f"{MADE}:flat", "--only", "outputs"]) == 2
    assert "its definition cannot run" in capsys.readouterr().err


def test_a_layer_that_raises_is_one_finding(capsys):
    assert main(["check", f"{MADE}:no_backward"]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "it raised RuntimeError: no backward; no other check was done" in said
    assert "1 wrong" in said


def test_experts_that_an_implementation_does_not_reach_are_unchecked():
    pytest.importorskip("transformers")
    from moestro.check.foreign_models import subjects

    from ..probe import foreign_zoo as zoo

    (subject,) = subjects(zoo.build("Llama4ForCausalLM"), "grouped_mm")
    report = check(subject, only=["outputs"])
    assert report.exit_code == 3
    assert "its own code ran" in report.found[0].finding.words
    with pytest.raises(ConfigError, match="knows no experts_implementation 'none'"):
        subjects(zoo.build("MixtralForCausalLM"), "none")

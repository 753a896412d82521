"""The figure: each model's two sizes and its cost, rumours hollow and named so."""

import pytest
from matplotlib.figure import Figure

from moestro.plan import figure as module
from moestro.plan.devices import DEVICES
from moestro.plan.presets import preset
from moestro.plan.report import Question, report

NAMES = ["mixtral-8x7b", "llama-2-70b", "gpt-4-rumour"]


def draw(monkeypatch, path, names, question):
    made = []

    def remember(*args, **kwargs):
        made.append(Figure(*args, **kwargs))
        return made[0]

    monkeypatch.setattr(module, "Figure", remember)
    reports = [report(preset(name), question) for name in names]
    module.figure(reports, path)
    return reports, made[0].axes


def marks(axes):
    """(value, place, fill) of every mark; what the legend is made of has no place."""
    drawn = [line for line in axes.lines if line.get_marker() in "osD" and len(line.get_xdata())]
    return [(line.get_xdata()[0], line.get_ydata()[0], line.get_mfc()) for line in drawn]


def test_sizes_and_cost(monkeypatch, tmp_path):
    reports, (left, right) = draw(monkeypatch, tmp_path / "plan.png", NAMES, Question())
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    labels = [label.get_text() for label in left.get_yticklabels()]
    assert labels == ["mixtral-8x7b", "llama-2-70b", "gpt-4-rumour (RUMOUR)"]
    points, costs = ({point[:2] for point in marks(axes)} for axes in (left, right))
    for place, answer in enumerate(reports):
        assert {(answer.active, place), (answer.total, place)} <= points
        assert (answer.forward_flops, place) in costs
    assert "FLOPs" in right.get_xlabel()


def test_a_rumour_is_hollow(monkeypatch, tmp_path):
    _, (left, right) = draw(monkeypatch, tmp_path / "plan.png", NAMES, Question())
    for axes in (left, right):
        hollow = {place for _, place, fill in marks(axes) if fill == "white"}
        assert hollow == {2}


@pytest.mark.parametrize(("names", "said"), [(NAMES[:2], "$"), (NAMES, "FLOPs")])
def test_cost_is_a_price_where_all_have_one(monkeypatch, tmp_path, names, said):
    question = Question(device=DEVICES["h100"], usd_per_hour=2.0)
    reports, (_, right) = draw(monkeypatch, tmp_path / "plan.png", names, question)
    assert said in right.get_xlabel()
    if said == "$":
        assert [value for value, _, _ in marks(right)] == [
            answer.decode.usd_per_million for answer in reports
        ]

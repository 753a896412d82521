import sys
from subprocess import run
from xml.etree import ElementTree

import pytest
from matplotlib.image import imread

from moestro.errors import MoestroError
from moestro.probe.measures.measure import measure
from moestro.probe.report import figures

from .changed import make_ablations
from .traces import make_trace


def findings(**options):
    return measure(make_trace(**{"domains": ("a", "b", "c"), **options}), draws=19)


def test_every_figure_is_a_readable_png_and_an_svg_with_something_on_it(tmp_path):
    paths = figures.save_figures(findings(), tmp_path)
    names = ["load", "experts_by_domain", "specialisation", "repetition", "caching"]
    assert [path.name for path in paths] == [f"{n}.{end}" for n in names for end in ("png", "svg")]
    for path in paths[::2]:
        pixels = imread(path)
        assert min(pixels.shape[:2]) > 150
        assert pixels[..., :3].std() > 0.02
    for path in paths[1::2]:
        assert len(list(ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}path"))) > 4


def test_the_same_findings_give_the_same_bytes(tmp_path):
    found, twin = findings(), tmp_path / "twin"
    twin.mkdir()
    for one, other in zip(
        figures.save_figures(found, tmp_path), figures.save_figures(found, twin), strict=True
    ):
        assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(
    "options",
    [
        {"layers": 1, "top_k": 1},
        {
            "layers": 13,
            "experts": 17,
            "domains": tuple("abcdefghijk"),
            "documents": 1,
            "sequences": 1,
        },
        {"domains": ("$x", "<b>$y$", "a&b")},
    ],
    ids=["one layer", "many of all", "names with signs"],
)
def test_odd_sizes_and_names_draw_without_warnings(tmp_path, options):
    assert len(figures.save_figures(findings(**options), tmp_path)) == 10


def test_only_what_was_measured_is_drawn(tmp_path):
    paths = figures.save_figures(findings(domains=("one",)), tmp_path)
    names = {path.stem for path in paths}
    assert names == {"load", "experts_by_domain", "repetition", "caching"}
    choice = findings(empty=0.5)
    with pytest.raises(MoestroError, match="token choice"):
        figures.repetition_figure(choice)
    with pytest.raises(MoestroError, match="token choice"):
        figures.caching_figure(choice)


def test_ablations_are_drawn_when_there_are_any(tmp_path):
    paths = figures.save_figures(findings(), tmp_path, ablations=make_ablations())
    assert [path.name for path in paths[-2:]] == ["ablation.png", "ablation.svg"]
    axes = figures.ablation_figure(make_ablations()).axes[0]
    assert "bits per token" in axes.get_xlabel()
    labels = [tick.get_text() for tick in axes.get_yticklabels()]
    assert labels[2] == "layer 1, expert 2: code (for comparison)"


def test_axes_say_what_they_show():
    found = findings()
    axes = figures.specialisation_figure(found, found.specialisation[0]).axes[0]
    assert axes.get_ylabel() == "total variation distance (0 to 1)"
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0", "1"]
    labels = axes.get_legend_handles_labels()[1]
    assert {"a", "b", "c"} <= set(labels)
    assert any("chance" in label for label in labels)


def test_a_chosen_layer_is_drawn_alone():
    found = findings()
    panels = [axes.get_title() for axes in figures.table_figure(found, layer=1).axes]
    assert panels[0] == "layer 1"
    assert "layer 0" not in panels
    with pytest.raises(MoestroError, match="layer 2 is not a mixture layer; choose one of 0, 1"):
        figures.table_figure(found, layer=2)


def test_a_folder_that_cannot_be_written(tmp_path):
    with pytest.raises(MoestroError, match="cannot write"):
        figures.save_figures(findings(), tmp_path / "missing")


def test_drawing_leaves_pyplot_alone():
    code = "import sys, moestro.probe.report.figures; print('matplotlib.pyplot' in sys.modules)"
    done = run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"

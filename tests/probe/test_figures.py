import sys
from subprocess import run

import numpy as np
import pytest
from matplotlib.image import imread

from moestro.errors import MoestroError
from moestro.probe import figures
from moestro.probe.measure import measure
from moestro.probe.record import Recording


def findings(num_layers=2, num_domains=3, num_experts=4, top_k=2, windows=6, seq_len=8):
    rng = np.random.default_rng(0)
    shape = (num_layers, num_domains * windows, seq_len)
    experts = rng.random((*shape, num_experts)).argsort(-1)[..., :top_k].astype(np.uint8)
    counts = (experts[..., None] == np.arange(num_experts)).sum(axis=(2, 3))
    recording = Recording(
        domains=tuple(f"domain {i}" for i in range(num_domains)),
        moe_layers=tuple(range(1, 2 * num_layers, 2)),
        top_k=top_k,
        domain_N=np.repeat(np.arange(num_domains), windows),
        block_N=np.arange(shape[1]),
        counts_LNE=counts,
        probs_LNE=counts / counts.sum(-1, keepdims=True),
        entropy_LN=np.ones(shape[:2]),
        dropped_LN=np.zeros(shape[:2], dtype=np.int64),
        experts_LNSK=experts,
    )
    return measure(recording, draws=10)


def test_every_figure_is_a_readable_png_with_something_on_it(tmp_path):
    paths = figures.save_figures(findings(), tmp_path)
    names = ["load.png", "experts_by_domain.png", "specialisation.png", "repetition.png"]
    assert [path.name for path in paths] == names
    for path in paths:
        pixels = imread(path)
        assert min(pixels.shape[:2]) > 150
        assert pixels[..., :3].std() > 0.02


@pytest.mark.parametrize(
    "shape",
    [
        {"num_layers": 1, "top_k": 1},
        {"num_layers": 30, "num_experts": 64, "num_domains": 12, "windows": 2},
        {"num_experts": 1, "top_k": 1},
        {"windows": 1},
    ],
    ids=["one layer", "many of all", "one expert", "one window a domain"],
)
def test_odd_sizes_draw_without_warnings(tmp_path, shape):
    assert len(figures.save_figures(findings(**shape), tmp_path)) == 4


def test_only_what_was_measured_is_drawn(tmp_path):
    one_domain = findings(num_domains=1)
    names = [path.name for path in figures.save_figures(one_domain, tmp_path)]
    assert names == ["load.png", "experts_by_domain.png", "repetition.png"]
    with pytest.raises(MoestroError, match="two domains"):
        figures.specialisation_figure(one_domain)
    with pytest.raises(MoestroError, match="token choice"):
        figures.repetition_figure(findings()._replace(repetition=None))


def test_axes_say_what_they_show():
    found = findings()
    axes = figures.specialisation_figure(found).axes[0]
    assert axes.get_ylabel() == "total variation distance (0 to 1)"
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "3"]
    labels = axes.get_legend_handles_labels()[1]
    assert set(found.domains) < set(labels)
    assert any("chance" in label for label in labels)


def test_a_chosen_layer_is_drawn_alone():
    found = findings()
    panels = [axes.get_title() for axes in figures.table_figure(found, layer=3).axes]
    assert panels[0] == "layer 3"
    assert "layer 1" not in panels
    with pytest.raises(MoestroError, match="layer 2 is not a mixture layer; choose one of 1, 3"):
        figures.table_figure(found, layer=2)


def test_a_folder_that_cannot_be_written(tmp_path):
    with pytest.raises(MoestroError, match="cannot write"):
        figures.save_figures(findings(), tmp_path / "missing")


def test_drawing_leaves_pyplot_alone():
    code = "import sys, moestro.probe.figures; print('matplotlib.pyplot' in sys.modules)"
    done = run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"

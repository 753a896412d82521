"""The checks as tests of another project."""

import subprocess
import sys

import pytest

# Before pytester restores sys.modules: what torch.distributed registers, it registers once.
import moestro.check.running  # noqa: F401

pytest_plugins = ["pytester"]
# The plugin comes with the installed package; no suite needs to name it.
SUITE = """
import pytest
from tests.check.made import clean, doubled

CHECKS = ["outputs", "expert-gradients", "odd-widths", "adapter-merge"]

@pytest.mark.moestro(clean, only=CHECKS)
def test_clean(moestro_finding):
    pass

@pytest.mark.moestro(doubled, only=CHECKS, skip=["adapter-merge"])
def test_doubled(moestro_finding):
    pass

def test_fixture(moestro_check):
    assert moestro_check(clean, only=["outputs"]).ok

def test_fixture_fails(moestro_check):
    moestro_check(doubled, only=["expert-gradients"])
"""


def test_each_check_is_a_test_of_the_other_project(pytester, monkeypatch):
    monkeypatch.syspath_prepend(str(pytester.path))
    pytester.makepyfile(SUITE)
    done = pytester.runpytest_inprocess("-rA", "--strict-markers", "-p", "no:cacheprovider")
    done.assert_outcomes(passed=6, failed=2, skipped=1)
    done.stdout.fnmatch_lines(
        [
            "*expert-gradients: the gradient of * differs *(all of it is 2 times).*",
            "PASSED *::test_clean[[]outputs[]]",
            "SKIPPED *no adapters are described",
            "FAILED *::test_doubled[[]expert-gradients[]]*",
        ]
    )


def test_bad_use_is_one_sentence(pytester):
    pytester.makepyfile(
        """
        import pytest

        def raises():
            raise KeyError("experts")

        @pytest.mark.moestro(raises, only=["outputs"])
        def test_raises(moestro_finding):
            pass

        def test_unmarked(moestro_finding):
            pass
        """
    )
    done = pytester.runpytest_inprocess("-p", "no:cacheprovider")
    done.assert_outcomes(errors=2)
    done.stdout.fnmatch_lines(
        ["*raises raised KeyError: 'experts'*", "*needs @pytest.mark.moestro*"]
    )


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ('clean, onyl=["outputs"]', "has no option 'onyl'; it has only, skip, seed, slow, impl"),
        ("clean, ours", "takes one target; it was given 2"),
    ],
)
def test_a_mark_that_would_be_misread_is_an_error(given, words, pytester):
    pytester.makepyfile(
        f"""
        import pytest
        from tests.check.made import clean, ours

        @pytest.mark.moestro({given})
        def test_mine(moestro_finding):
            pass
        """
    )
    done = pytester.runpytest_inprocess("-p", "no:cacheprovider")
    assert done.parseoutcomes()["errors"] == 1
    done.stdout.fnmatch_lines([f"*{words}*"])


def test_what_could_not_be_checked_does_not_pass(pytester, monkeypatch):
    """A fixture fails; of two mixtures one of which could not be looked at, the test is skipped."""
    monkeypatch.syspath_prepend(str(pytester.path))
    pytester.makepyfile(
        """
        import dataclasses

        import pytest

        from moestro.check import targets
        from tests.check.made import ours

        clean = targets.of_moe(ours(), "clean")
        lost = dataclasses.replace(clean, title="lost", unreached="it was not reached")

        @pytest.fixture
        def moestro_trials(monkeypatch):
            monkeypatch.setattr(targets, "of_anything", lambda *_: [clean, lost])
            return {}

        @pytest.mark.moestro("both", only=["outputs"])
        def test_both(moestro_finding):
            pass

        def test_fixture(moestro_check):
            moestro_check(lost, only=["outputs"])
        """
    )
    done = pytester.runpytest_inprocess("-rA", "-p", "no:cacheprovider")
    done.assert_outcomes(skipped=1, failed=1)
    done.stdout.fnmatch_lines(
        ["*outputs could not be done: it was not reached*", "SKIPPED *lost: it was not reached"]
    )


def test_the_plugin_alone_imports_nothing_heavy_and_changes_no_other_suite(pytester):
    code = "import sys, moestro.check.pytest_plugin; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    pytester.makepyfile("def test_other():\n    import sys\n    assert True\n")
    done = pytester.runpytest_inprocess("--strict-markers")
    done.assert_outcomes(passed=1)

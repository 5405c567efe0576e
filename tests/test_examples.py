"""The examples of the gallery run, in their short form, and draw their pictures."""

import runpy
import sys
from pathlib import Path

import pytest

from odenet_cuda.compiled import compilation

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
NAMES = (
    "anode",
    "bouncing_ball",
    "cnf_densities",
    "doses",
    "few_steps",
    "flow_matching",
    "hamiltonian",
    "latent_ode",
    "lotka_volterra",
    "mpc_pendulum",
    "pendulum",
    "robertson",
    "sweep",
)
MOST_LINES = 200


@pytest.mark.parametrize("name", NAMES)
def test_runs_short(name, tmp_path, quick_compiler, one_thread, monkeypatch, capsys):
    """As a program in which nobody has called `set_compile`. What is compiled is not optimised: that takes time."""
    pytest.importorskip("matplotlib")
    pytest.importorskip("tqdm")
    pytest.importorskip("sklearn")
    monkeypatch.setattr(compilation, "_asked", None)
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
    monkeypatch.setattr(sys, "argv", [name, "--short", "--out", str(tmp_path)])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    said, picture = capsys.readouterr().out, tmp_path / f"{name}.png"
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and f"picture: {picture}" in said
    assert "served by the stepper" not in said, said


def test_every_example_is_short_and_tested():
    programs = {path.stem for path in EXAMPLES.glob("*.py")} - {"gallery", "odenet_digits", "digits_plots"}
    assert programs == set(NAMES)
    for name in NAMES:
        assert (EXAMPLES / f"{name}.py").read_text().count("\n") < MOST_LINES

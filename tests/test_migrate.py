"""``python -m odenet_cuda migrate``: what it says of programs, and that a program changed as it says gives the same numbers."""

import subprocess
import sys
import textwrap

import pytest
import torch

from odenet_cuda import migrate, odeint


def said(tmp_path, text: str) -> list[str]:
    path = tmp_path / "program.py"
    path.write_text(textwrap.dedent(text))
    return [line.strip() for line in migrate.report(path).lines()][1:]


def test_imports(tmp_path):
    found = said(
        tmp_path,
        """
        import torch, torchdiffeq
        import torchdiffeq as td
        from torchdiffeq import odeint_adjoint as odeint
        from torchdiffeq._impl.misc import _rms_norm
        from torchdiffeq._impl.solvers import FixedGridODESolver
        """,
    )
    assert "-> import torch; import odenet_cuda as torchdiffeq" in found
    assert "-> import odenet_cuda as td" in found
    assert "-> from odenet_cuda import odeint_adjoint as odeint" in found
    assert "-> from odenet_cuda._impl.misc import _rms_norm" in found
    place = found.index("5  from torchdiffeq._impl.solvers import FixedGridODESolver".replace("5", "6", 1))
    assert found[place + 1] == "-> keep it: see below"
    assert "6  torchdiffeq._impl.solvers.FixedGridODESolver: NOT SERVED" in found


def test_inner_parts_without_an_import(tmp_path):
    found = said(
        tmp_path,
        """
        import torchdiffeq as td
        params = td._impl.adjoint.find_parameters(block)
        norm = td._impl.misc._rms_norm
        solver = td._impl.solvers.FixedGridODESolver(f, y)
        """,
    )
    assert "5  torchdiffeq._impl.solvers.FixedGridODESolver: NOT SERVED" in found
    assert sum("NOT SERVED" in line for line in found) == 1


def test_nothing_to_do(tmp_path):
    assert said(tmp_path, "import torch\n") == ["imports nothing of torchdiffeq"]


COMPILED = 'compiled with set_compile("auto") where the field can be read, else the stepper'
CALLS = {
    "torchdiffeq.odeint(f, y, t)": (f"odeint, method dopri5: {COMPILED}", []),
    "odeint(f, y, t, method='rk4', options=dict(step_size=0.1, speed=2))": (
        f"odeint, method rk4: {COMPILED}",
        ["rk4 warns of options it does not know and goes on: speed"],
    ),
    "odeint(f, y, t, method='dopri8', options={'norm': g})": (
        "odeint, method dopri8: the stepper",
        [migrate._DIFFERS["dopri8"], "the stepper alone: options['norm']"],
    ),
    "odeint(f, y, t, method=args.method)": (f"odeint, a method that is decided as it runs: {COMPILED}", []),
    "odeint(f, y, t, method='gone')": (
        "odeint, method gone: NOT SERVED",
        ["'gone' is no method of torchdiffeq or odenet_cuda"],
    ),
    "odeint(f, y, t, method='rk45')": ("odeint, method rk45: NOT SERVED", ["'rk45' is no method of torchdiffeq"]),
    "odeint(f, y, t, event_fn=g)": ("odeint, method dopri5: the stepper", ["the stepper alone: events"]),
    "odeint(f, y, t, **k)": (f"odeint, method dopri5: {COMPILED}", ["it is given **keywords"]),
    "odeint(lambda t, y: -y, y, t)": (f"odeint, method dopri5: {COMPILED}", ["a lambda made at the call"]),
    "torchdiffeq.odeint_adjoint(f, y, t, adjoint_options={'norm': g})": (
        "odeint_adjoint, method dopri5: the stepper",
        ["the stepper alone: a norm of the adjoint"],
    ),
    "torchdiffeq.odeint_adjoint(f, y, t, adjoint_options={'norm': 'seminorm'})": (
        f"odeint_adjoint, method dopri5: {COMPILED}",
        [],
    ),
    "torchdiffeq.odeint_dense(f, y, 0.0, 1.0)": (
        "odeint_dense, method dopri5: the stepper",
        ["the stepper alone: an interpolant"],
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_calls(tmp_path, call):
    found = said(tmp_path, f"import torchdiffeq\nfrom torchdiffeq import odeint\n{call}\n")
    line, notes = CALLS[call]
    place = found.index(f"3  {line}")
    for note, expected in zip(found[place + 1 :], notes, strict=False):
        assert note.startswith(expected)
    assert len(found) == place + 2 + len(notes)  # the last says what to add


def test_either_function(tmp_path):
    """A name that is one function or the other."""
    found = said(
        tmp_path,
        """
        import torchdiffeq
        if adjoint:
            from torchdiffeq import odeint_adjoint as odeint
        else:
            from torchdiffeq import odeint
        solve = torchdiffeq.odeint_adjoint if adjoint else torchdiffeq.odeint
        odeint(f, y, t)
        solve(f, y, t)
        """,
    )
    assert f"8  odeint or odeint_adjoint, method dopri5: {COMPILED}" in found
    assert f"9  odeint or odeint_adjoint, method dopri5: {COMPILED}" in found


FIELD = """
import torchdiffeq
class Layer(nn.Module):
    def forward(self, t, y):
        return y
class Field(nn.Module):
    def __init__(self):
        self.layer = Layer()
        {made}
    def forward(self, t, y):
        self.nfe += 1
        if self.training or y.shape[0] > 1 or self.noise is None:
            pass
        size = float(y.size(0))
        {body}
        return self.layer(t, y)
model = Field()
torchdiffeq.odeint(model, y, t)
"""
OBSTACLES = {
    "k = y.sum()\n        if k > 0: pass": "branches on a value of the time or the state: use torch.where (line 16)",
    "k = float(t)": "float() takes a value of the time or the state into Python (line 15)",
    "k = (2 * y).norm().item()": ".item() takes a value of the time or the state into Python (line 15)",
    "self.last = y": "keeps 'last': drop that, or compile(func, pure=True) (line 15)",
    "y = y + torch.randn_like(y)": "draws random numbers: make them at the first call, or hand them over (line 15)",
    "print(y)": "prints (line 15)",
    "if self.noise is None: self.noise = torch.randn_like(y)": "",
    "y = torch.where(y > 0, y, -y)": "",
}


@pytest.mark.parametrize("body", OBSTACLES)
def test_obstacles_in_a_field(tmp_path, body):
    found = said(tmp_path, FIELD.format(body=body, made="pass"))
    obstacle = OBSTACLES[body]
    place = found.index(f"6  field Field: {'for the stepper' if obstacle else 'looks readable'}")
    if obstacle:
        assert found[place + 1] == obstacle
    last = "nothing to add" if obstacle else "one line makes it faster"
    assert len(found) == place + 2 + bool(obstacle) and found[-1].startswith(last)


@pytest.mark.parametrize("layer", ["nn.Dropout(0.1)", "nn.BatchNorm1d(2)", "nn.Conv2d(1, 1, 3)"])
def test_layers(tmp_path, layer):
    found = said(tmp_path, FIELD.format(body="pass", made=f"self.extra = {layer}"))
    assert "6  field Field: for the stepper" in found and any("(line 9)" in line for line in found)


PROGRAM = """
import torch
from torchdiffeq import odeint

print(float(odeint(lambda t, y: torch.cos(t) * y, torch.ones(1, dtype=torch.float64), torch.tensor([0.0, 2.0]))[-1]))
"""


def test_the_program_changed_as_it_says(tmp_path):
    """It runs without torchdiffeq and gives its numbers."""
    (new,) = [line[3:] for line in said(tmp_path, PROGRAM) if line.startswith("-> ")]
    changed = PROGRAM.replace("from torchdiffeq import odeint", new) + "import sys\nassert 'torchdiffeq' not in sys.modules\n"
    done = subprocess.run([sys.executable, "-c", changed], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    y = odeint(lambda t, y: torch.cos(t) * y, torch.ones(1, dtype=torch.float64), torch.tensor([0.0, 2.0]))
    assert float(done.stdout) == float(y[-1])
    assert float(done.stdout) == pytest.approx(torch.exp(torch.sin(torch.tensor(2.0, dtype=torch.float64))).item(), rel=1e-6)


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "cannot be read"), ("def f(:\n", "is no Python: invalid syntax, line 1")],
    ids=["missing", "syntax"],
)
def test_what_cannot_be_read(tmp_path, content, words):
    path = tmp_path / "program.py"
    if content is not None:
        path.write_text(content)
    done = subprocess.run([sys.executable, "-m", "odenet_cuda", "migrate", str(path)], capture_output=True, text=True)
    assert done.returncode != 0 and words in done.stderr and "Traceback" not in done.stderr


def test_no_file():
    done = subprocess.run([sys.executable, "-m", "odenet_cuda", "migrate"], capture_output=True, text=True)
    assert done.returncode != 0 and "no file given" in done.stderr

"""The CUDA text of compiled fields: nvcc compiles it, and the threads of a CPU, in blocks of eight, solve with it.

What a GPU makes of it these tests do not show.
"""

import hashlib
import os
import re
import subprocess
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from compile_native import FLAGS, require_compiler, run_compiler, setup_py
from compiled_fields import Flow, Net, Stretched, compare, compare_gradients, gradients, lorenz, rows
from problems import ADAPTIVE_METHODS
from test_cuda_compile import CSRC, find_nvcc

import odenet_cuda
from odenet_cuda import _C, SolverError, solve
from odenet_cuda.compiled import engine, plan, teams, ways
from odenet_cuda.compiled.emit import Target
from odenet_cuda.compiled.teams import H100, Card, Team
from odenet_cuda.methods import find_method
from odenet_cuda.problem import Structure

D = torch.float64
TIMES = torch.tensor([0.0, 0.013, 0.3, 0.31, 1.0], dtype=D)
NATIVE = Path(__file__).resolve().parent / "native"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    require_compiler()
    return tmp_path_factory.mktemp("fields")


@pytest.fixture
def emulated(folder, monkeypatch):
    """Solves on the CPU run the CUDA text, compiled with native/emulation.h."""
    compiler = setup_py()["find_compiler"]()  # here, for libraries are compiled in several threads

    def load(text: str, capability: tuple[int, int]) -> _C.Library:
        path = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:20]}.so"
        if not path.exists():
            source = path.with_suffix(".cu")
            source.write_text(text)
            flags = [*FLAGS, "-w", "-O1", "-fPIC", "-shared", "-fno-gnu-unique"]
            flags += [*os.environ.get("ODENET_CXXFLAGS", "").split(), "-include", str(NATIVE / "emulation.h"), "-x", "c++"]
            run_compiler(compiler, *flags, str(source), "-pthread", "-o", str(path))
        return _C.Library(str(path))

    monkeypatch.setattr(plan, "load_text", load)
    for module in (engine, plan):
        monkeypatch.setattr(module, "card_of", lambda device: Card((9, 0), 1, 227 << 10))
    monkeypatch.setattr(engine, "on_cuda", lambda device: True)
    monkeypatch.setattr(teams, "ALONE", (8,))
    monkeypatch.setattr(teams, "THREADS", 64)
    monkeypatch.setattr(teams, "_BUSY", 0)


@pytest.mark.parametrize("control", ["per_sample", "joint"])
@pytest.mark.parametrize("batch", [1, 8, 21])
def test_solves(emulated, batch, control):
    """Blocks that are full and that are not; outputs between; every sample with its own steps."""
    func = odenet_cuda.compile(Stretched())
    compare(func, rows(batch, 2), TIMES, step_control=control, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", [*ADAPTIVE_METHODS, "rk4", "euler"])
def test_methods(emulated, method):
    options = {"method": method} if method in ADAPTIVE_METHODS else {"method": method, "step_size": 0.1}
    compare(odenet_cuda.compile(Net()), rows(10, 2), TIMES, rtol=1e-4, atol=1e-4, **options)


@pytest.mark.parametrize("control", ["per_sample", "joint"])
def test_rosenbrock_method(emulated, control):
    """A thread solves the systems of its sample, where fields of many operations have several threads too."""

    class Turning(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.rate = torch.nn.Parameter(torch.tensor(40.0, dtype=D))

        def forward(self, t, y):
            a, b = y.unbind(1)
            return torch.stack([self.rate * b - a**3, -self.rate * a - b * torch.cos(t.reshape(-1))], 1)

    options = dict(method="rodas5p", rtol=1e-4, atol=1e-4, step_control=control)
    compare(odenet_cuda.compile(Turning()), rows(10, 2), TIMES, **options)
    compare_gradients(Turning(), rows(10, 2), TIMES[[0, 2, 4]], 1e-9, **options)


def test_jumps_and_slices(emulated, monkeypatch):
    """A call that ends before the solve does goes on where it was, in blocks some of whose samples have ended too."""
    monkeypatch.setattr(ways, "_SLICE", 1e-9)
    func = odenet_cuda.compile(Stretched())
    for options in ({"step_control": "per_sample"}, {}, {"method": "rk4", "step_size": 0.25}):
        jumps = {} if "method" in options else {"jump_t": [0.5], "rtol": 1e-3, "atol": 1e-3}
        compare(func, rows(11, 2), TIMES[[0, 2, 4]], **options, **jumps)
    compare_gradients(Stretched(), rows(11, 2), TIMES[[0, 2, 4]], 1e-9, step_control="per_sample", rtol=1e-3, atol=1e-3)


def check_gradients(func: torch.nn.Module, control: str, gradient: str) -> None:
    options = {"method": "rk4", "step_size": 0.1} if control == "rk4" else {"step_control": control}
    tolerance = 1e-9
    if control != "rk4":
        options |= {"rtol": 1e-4, "atol": 1e-4} if gradient == "direct" else {"rtol": 1e-9, "atol": 1e-9}
        tolerance = 1e-9 if gradient == "direct" else 1e-5
    times = TIMES[[0, 2, 4]] if gradient == "direct" or control == "rk4" else TIMES[[0, 2]]
    if control == "rk4" and gradient == "adjoint":
        tolerance = 1e-3  # on a grid the two backward solves differ by more than rounding
    compare_gradients(func, rows(11, 2), times, tolerance, gradient=gradient, **options)


@pytest.mark.parametrize("control", ["per_sample", "joint", "rk4"])
@pytest.mark.parametrize("gradient", ["direct", "adjoint"])
def test_gradients(emulated, control, gradient):
    """For y0, weights and arguments: sums over the threads of a block, and over blocks."""
    check_gradients(Net(hidden=19), control, gradient)


def test_arguments_have_gradients(emulated):
    p = rows(11, 3, seed=3) + torch.tensor([10.0, 28.0, 8 / 3], dtype=D)
    compare_gradients(lorenz, rows(11, 3), [0.0, 0.05, 0.1], 1e-8, args=(p,), step_control="per_sample", rtol=1e-5, atol=1e-5)


def test_float32(emulated):
    compare(odenet_cuda.compile(Net(dtype=torch.float32)), rows(9, 2, dtype=torch.float32), [0.0, 1.0], 1e-5, counts=False)


_NONE = torch.nan
OWN_TIMES = torch.tensor([[0.0, 0.3, 0.31, 1.0], [1.0, 0.4, _NONE, _NONE], [0.5, _NONE, _NONE, _NONE]], dtype=D)


def times_of_each_sample(func: torch.nn.Module, monkeypatch) -> None:
    """Both directions, padding, and samples of one time, in lanes that take the next and in calls that end before they do."""
    y0, times, options = rows(29, 2), OWN_TIMES[torch.arange(29) % 3], {"step_control": "per_sample", "jump_t": [0.6]}
    compare(odenet_cuda.compile(func), y0, times, rtol=1e-4, atol=1e-4, **options)
    compare_gradients(func, y0, times, 1e-9, rtol=1e-4, atol=1e-4, **options)
    compare_gradients(func, y0, times, 1e-5, gradient="adjoint", rtol=1e-8, atol=1e-8, **options)
    monkeypatch.setattr(ways, "_SLICE", 1e-9)
    compare(odenet_cuda.compile(func), y0, times, rtol=1e-3, atol=1e-3, **options)


def test_times_of_each_sample(emulated, monkeypatch):
    times_of_each_sample(Stretched(), monkeypatch)


def test_same_bits(emulated):
    func, y0 = odenet_cuda.compile(Net()), rows(21, 2)
    found = []
    for _ in range(2):
        start = y0.clone().requires_grad_()
        func.zero_grad()
        solve(func, start, [0.0, 1.0], step_control="per_sample").ys[-1].sum().backward()
        found.append([start.grad, *(p.grad.clone() for p in func.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_failure(emulated):
    """It names the sample, and the others have their results."""
    func = odenet_cuda.compile(lambda t, y: y * y)
    y0 = torch.tensor([[0.5]] * 9 + [[2.0]], dtype=D)
    with pytest.raises(SolverError, match="sample 9"):
        solve(func, y0, [0.0, 1.0], step_control="per_sample")
    found = solve(func, y0, [0.0, 1.0], step_control="per_sample", on_failure="return").ys
    assert torch.isnan(found[1, 9]).all()
    torch.testing.assert_close(found[1, :9], torch.full((9, 1), 1.0, dtype=D), rtol=1e-5, atol=1e-5)


def test_joint_control_of_many_blocks(emulated):
    """Three run at once and have two or three times eight samples each; the numbers do not depend on who is first."""
    func, y0 = Stretched(), rows(61, 2)
    options = {"rtol": 1e-4, "atol": 1e-4, "jump_t": [0.5]}
    found = [compare(odenet_cuda.compile(func), y0, TIMES, **options).ys for _ in range(2)]
    assert torch.equal(*found)
    compare_gradients(func, y0, TIMES[[0, 2, 4]], 1e-9, rtol=1e-4, atol=1e-4)
    compare_gradients(func, y0, TIMES[[0, 2]], 1e-5, gradient="adjoint", rtol=1e-9, atol=1e-9)


def lanes_take_samples(func, adjoint: bool) -> None:
    """Three blocks of eight lanes have twelve samples each or more, one of which has no start: lanes take the next."""
    y0 = rows(37, 2)
    y0[17] = torch.nan
    options = {"step_control": "per_sample", "rtol": 1e-4, "atol": 1e-4, "on_failure": "return"}
    compare(odenet_cuda.compile(func), y0, TIMES, jump_t=[0.5], **options)
    y0 = rows(37, 2)
    options = {"step_control": "per_sample", "rtol": 1e-4, "atol": 1e-4}
    compare_gradients(func, y0, TIMES[[0, 2, 4]], 1e-9, **options)
    if adjoint:
        compare_gradients(func, y0, TIMES[[0, 2]], 1e-3, gradient="adjoint", **options | {"rtol": 1e-6, "atol": 1e-6})


def test_lanes_take_the_next_sample(emulated, monkeypatch):
    lanes_take_samples(Stretched(), True)
    monkeypatch.setattr(ways, "_SLICE", 1e-9)
    compare(odenet_cuda.compile(Stretched()), rows(37, 2), TIMES, step_control="per_sample", rtol=1e-3, atol=1e-3)


# Teams whose samples have several threads


@pytest.fixture
def grouped(emulated, monkeypatch):
    """Blocks of eight samples, with eight threads each."""
    monkeypatch.setattr(teams, "_NARROW", 1)
    monkeypatch.setattr(teams, "_BUSY", 1 << 20)
    monkeypatch.setattr(teams, "LANES", (8,))


def groups_of(func: odenet_cuda.CompiledField) -> set[int]:
    """Threads of a sample in the solves so far."""
    return {target.team.groups for _, target in func._latest.libraries}


@pytest.mark.parametrize("control", ["per_sample", "joint"])
@pytest.mark.parametrize("batch", [1, 8, 21])
def test_groups_solve(grouped, batch, control):
    func = odenet_cuda.compile(Net(hidden=19))
    compare(func, rows(batch, 2), TIMES, step_control=control, rtol=1e-5, atol=1e-6)
    assert groups_of(func) == {8}


@pytest.mark.parametrize("control", ["per_sample", "joint", "rk4"])
@pytest.mark.parametrize("gradient", ["direct", "adjoint"])
def test_gradients_of_groups(grouped, control, gradient):
    check_gradients(Net(hidden=19), control, gradient)


def test_lanes_of_groups_take_the_next_sample(grouped):
    lanes_take_samples(Net(hidden=19), False)


def test_times_of_each_sample_in_groups(grouped, monkeypatch):
    times_of_each_sample(Net(hidden=19), monkeypatch)


def test_groups_deal_all_kinds_of_statements(grouped):
    """Sums, slices, masks, derivatives of the field, leaves, arguments; a state of more rows than there are groups and of
    fewer; a jump in time."""
    compare_gradients(Flow(), rows(9, 3), TIMES[[0, 2]], 1e-9, rtol=1e-4, atol=1e-4, step_control="per_sample")
    weight, p = rows(23, 23, seed=3) / 4, rows(9, 5, seed=5)

    def mixed(t, y, p):
        a, b = y
        pushed = torch.where(a > 0, torch.softmax(a @ weight, 1), a.clamp(-0.5, 0.5) * p.sum(1, keepdim=True))
        return pushed - a * b.square().sum(1, keepdim=True), torch.cat([a[:, 3:14] * p[:, :1], a[:, :2]], 1) - b

    y0 = rows(9, 23), rows(9, 13, seed=1)
    options = {"step_control": "per_sample", "rtol": 1e-4, "atol": 1e-4}
    compare_gradients(mixed, y0, TIMES[[0, 2, 4]], 1e-9, args=(p,), **options)
    compare_gradients(
        mixed, y0, [0.0, 0.05], 1e-5, args=(p,), gradient="adjoint", step_control="per_sample", rtol=1e-8, atol=1e-8
    )
    compare(odenet_cuda.compile(Net(hidden=19)), rows(9, 2), TIMES, jump_t=[0.5], step_control="per_sample")


def test_groups_go_on_where_they_were(grouped, monkeypatch):
    """In many short calls, two blocks of joint control included."""
    monkeypatch.setattr(ways, "_SLICE", 1e-9)
    for control in ("per_sample", "joint"):
        options = {"step_control": control, "rtol": 1e-3, "atol": 1e-3}
        compare_gradients(Net(hidden=19), rows(11, 2), TIMES[[0, 2, 4]], 1e-9, **options)


class Wide(torch.nn.Module):
    """Layers 18-36-36-17 of float32, whose sizes no tensor core divides."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [18, 36, 36, 17]
        self.layers = torch.nn.ModuleList([torch.nn.Linear(n, m) for n, m in pairwise(sizes)])
        with torch.no_grad():
            for i, parameter in enumerate(self.parameters()):
                parameter.copy_(rows(*parameter.shape, seed=20 + i, dtype=torch.float32) / 4)

    def forward(self, t, y):
        y = torch.cat([y, torch.ones_like(y[:, :1]) * t], 1)
        for layer in self.layers[:-1]:
            y = torch.tanh(layer(y))
        return self.layers[-1](y)


@pytest.mark.parametrize(
    "matmul, most, lanes", [("float32", 1e-5, 16), ("tf32", 2e-3, 8), ("tf32", 2e-3, 32), ("bf16", 2e-2, 16)]
)
def test_tensor_cores(grouped, monkeypatch, matmul, most, lanes):
    """As exact as their operands, and not much more."""
    monkeypatch.setattr(teams, "LANES", (lanes,))
    net = Wide()
    func = odenet_cuda.compile(net, matmul=matmul)
    y0, times, options = rows(37, 17, dtype=torch.float32), [0.0, 0.4, 0.5], {"method": "rk4", "step_size": 0.25}
    for gradient in ("direct", "adjoint"):
        found = gradients(func, y0, times, list(net.parameters()), gradient=gradient, **options)
        expected = gradients(net, y0, times, list(net.parameters()), gradient=gradient, **options)
        errors = [float((x - y).abs().max() / y.abs().max()) for x, y in zip(found, expected, strict=True)]
        assert max(errors) < most
        assert matmul == "float32" or max(errors) > most / 50
    assert groups_of(func) == {64 // lanes}
    assert all(target.team.matmul == matmul for _, target in func._latest.libraries)


@pytest.mark.parametrize("memory, groups, staged", [(227 << 10, 8, 2), (12500, 8, 0), (1 << 10, 1, 0)])
def test_memory_of_a_block(grouped, monkeypatch, memory, groups, staged):
    """It holds the matrices of the layers, once where they are read transposed too; none where it
    is too small; and where it is too small for rows of eight samples, a sample has one thread."""
    for module in (engine, plan):
        monkeypatch.setattr(module, "card_of", lambda device: Card((9, 0), 1, memory))
    net = Net(hidden=19)
    func = odenet_cuda.compile(net)
    found = gradients(func, rows(9, 2), [0.0, 0.2], list(net.parameters()), step_control="per_sample")
    expected = gradients(net, rows(9, 2), [0.0, 0.2], list(net.parameters()), step_control="per_sample")
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert groups_of(func) == {groups}
    text = next(
        func._latest.source(method, target)
        for (_, target), (method, _) in func._latest.libraries.items()
        if target.solve == "reverse"
    )
    assert text.count("  stage_matrix<") == staged


@pytest.fixture(scope="module")
def fields() -> dict[str, odenet_cuda.CompiledField]:
    """A small net, whose samples have a thread each, and a wide one, with more."""
    small, wide = odenet_cuda.compile(Net()), odenet_cuda.compile(Wide())
    solve(small, rows(5, 2), [0.0, 0.1])
    solve(wide, rows(5, 17, dtype=torch.float32), [0.0, 0.1])
    return {"alone": small, "float32": wide, "tf32": wide, "bf16": wide}


def text_of(func: odenet_cuda.CompiledField, solve: str, team: Team) -> str:
    dtype = "double" if team.item == 8 else "float"
    return func._latest.source(find_method("dopri5"), Target(dtype, "one", solve, team))


def test_what_is_staged_before_a_solve(fields):
    """Matrices that tensor cores alone read are rounded then. Of small fields all constants, while there is room."""
    narrow, small = odenet_cuda.compile(Net(12, 36, torch.float32)), fields["alone"]
    solve(narrow, rows(5, 12, dtype=torch.float32), [0.0, 0.1])
    for matmul, func, kind, count, rounded in (
        ("float32", fields["tf32"], "reverse", 3, 0),
        ("tf32", fields["tf32"], "reverse", 3, 3),
        ("tf32", narrow, "per_sample", 2, 1),  # the other has 12 rows
        ("tf32", narrow, "reverse", 2, 0),  # as the first has on the way back
    ):
        text = text_of(func, kind, Team(32, 8, matmul, 4, H100.memory))
        staged = [line for line in text.splitlines() if line.startswith("  stage_matrix<")]
        assert len(staged) == count and sum("TensorCore>" in line for line in staged) == rounded
    team = small._latest.team(("per_sample",), 1 << 16, H100, "float32")
    text = text_of(small, "per_sample", team)
    assert team.groups == 1 and text.count("  stage_matrix<") == text.count("(team_memory(") == 4
    assert text.count("in.constants[") == 4 and "#define ODENET_STAGED 304\n" in text
    needed = int(re.findall(r"Block::size, (\d+)>", text)[0])
    few = text_of(small, "per_sample", replace(team, memory=needed - 1))
    assert few.count("(team_memory(") == 3 and few.count("in.constants[") == 4


def test_teams_fill_the_card():
    """More samples, more of them in a block; fields of few operations have a thread a sample."""
    func = odenet_cuda.compile(Wide())
    solve(func, rows(3, 17, dtype=torch.float32), [0.0, 0.1])
    found = [func._latest.team(("per_sample",), batch, H100, "tf32") for batch in (1, 1056, 2112, 4224, 10**6)]
    assert [(team.lanes, team.groups) for team in found] == [(8, 32), (8, 32), (16, 16), (32, 8), (32, 8)]
    assert {team.matmul for team in found} == {"tf32"}
    small = odenet_cuda.compile(Net(hidden=50))
    solve(small, rows(3, 2), [0.0, 0.1])
    found = [small._latest.team(("per_sample",), batch, H100, "tf32") for batch in (20, 8448, 8449, 10**6)]
    assert [(team.lanes, team.groups) for team in found] == [(8, 32), (32, 8), (64, 1), (128, 1)]


def test_matmul_is_checked():
    with pytest.raises(ValueError, match=r"matmul must be one of .*, got 'fp8'"):
        odenet_cuda.compile(Net(), matmul="fp8")


KINDS = [(kind, "dopri5") for kind in ("per_sample", "joint", "adjoint_per_sample", "adjoint_joint", "reverse")]
KINDS += [("grid", "rk4"), ("adjoint_grid", "rk4")]


COMPILED = [("alone", *kind, ["sm_90"]) for kind in [*KINDS, ("per_sample", "rodas5p"), ("joint", "rosenbrock23")]]
COMPILED += [("alone", "reverse", "rodas5p", ["sm_90"])]
COMPILED += [("float32", "per_sample", "dopri5", ["sm_90"]), ("float32", "adjoint_joint", "dopri5", ["sm_90"])]
COMPILED += [("tf32", "reverse", "dopri5", ["sm_90"]), ("bf16", "adjoint_joint", "dopri5", ["sm_80", "sm_90", "sm_100"])]


@pytest.mark.parametrize("matmul, kind, method, cards", COMPILED)
def test_nvcc_compiles(fields, kind, method, matmul, cards, tmp_path):
    """Into a library like that of the CPU; no GPU is needed. All that differs between cards is in the last."""
    from odenet_cuda.compiled.compilers import CUDA_FLAGS

    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc was found")
    found, stiff = fields[matmul]._latest, method.startswith("ro")
    if stiff and kind == "reverse":  # which needs second derivatives
        found = plan.Plan(Net(), Structure(rows(5, 2)), (), False, by_time=True, second=True)
    team = found.team((kind,), 1 << 16, H100, matmul if matmul != "alone" else "float32", stiff)
    dtype = "double" if matmul == "alone" else "float"
    text = found.source(find_method(method), Target(dtype, "one", kind, team))
    source, library = tmp_path / "field.cu", tmp_path / "field.so"
    source.write_text(text)
    for card in cards:
        command = [nvcc, *CUDA_FLAGS, f"-arch={card}", f"-I{CSRC}", str(source), "-o", str(library)]
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 0, (run.stdout + run.stderr)[-3000:]
    loaded = _C.Library(str(library))
    assert (loaded.lanes, loaded.team, loaded.groups) == (1, team.lanes, team.groups) and loaded.tile_bytes > 0
    assert (team.groups == 1) == (matmul == "alone")


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [300, 20_000])
@pytest.mark.parametrize("control", ["per_sample", "joint"])
@pytest.mark.parametrize("gradient", ["direct", "adjoint"])
def test_gpu(control, gradient, batch):
    """On a GPU: values and gradients beside the stepper's on the CPU; joint control in many blocks."""
    results = []
    for device in ("cuda", "cpu"):
        net = Net().to(device)
        func = odenet_cuda.compile(net, cuda=True) if device == "cuda" else net
        y0 = rows(batch, 2).to(device).requires_grad_()
        ys = solve(func, y0, TIMES[[0, 2, 4]], step_control=control, gradient=gradient, rtol=1e-9, atol=1e-9).ys
        ys.square().mean().backward()
        results.append([x.detach().cpu() for x in (ys, y0.grad, *(p.grad for p in net.parameters()))])
        if device == "cuda":
            assert func.explain() == "compiled"
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [37, 3000, 20_000])
@pytest.mark.parametrize("matmul, most", [("float32", 1e-5), ("tf32", 2e-3), ("bf16", 2e-2)])
def test_gpu_tensor_cores(matmul, most, batch):
    """Blocks of 8, 16 and 32 samples beside the stepper on the CPU."""
    net, results = Wide(), []
    for device in ("cuda", "cpu"):
        net = net.to(device)
        func = odenet_cuda.compile(net, cuda=True, matmul=matmul) if device == "cuda" else net
        y0 = rows(batch, 17, dtype=torch.float32).to(device)
        for gradient in ("direct", "adjoint"):
            options = {"method": "rk4", "step_size": 0.25, "gradient": gradient}
            results.append([x.cpu() for x in gradients(func, y0, [0.0, 0.4, 1.0], list(net.parameters()), **options)])
        if device == "cuda":
            assert func.explain() == "compiled" and 1 not in groups_of(func)
    for found, expected in ((results[0], results[2]), (results[1], results[3])):
        errors = [float((x - y).abs().max() / y.abs().max()) for x, y in zip(found, expected, strict=True)]
        assert max(errors) < most

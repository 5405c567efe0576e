"""Stepper against the ops: the same kernels with arguments bound once must give the same bits."""

import math

import pytest
import torch
from torch import Tensor

from odenet_cuda import methods, ops
from odenet_cuda.ops import DTYPES, FIELDS, STOPS
from odenet_cuda.problem import Problem
from odenet_cuda.step_control import StepControl, initial_state
from odenet_cuda.stepper import Stepper
from odenet_cuda.tableau import ButcherTableau

SENTINEL = -12345.0
MIXED = (torch.float32, torch.complex64, torch.bfloat16)
TYPES = [
    *(pytest.param((dtype,), id=str(dtype).removeprefix("torch.")) for dtype in DTYPES),
    pytest.param(MIXED, id="mixed"),
]
ABOVE_GRAIN = 50_003  # elements a leaf: more than one thread's share
LEAVES = [
    pytest.param([(4, 3)], False, id="one-leaf-joint"),
    pytest.param([(4, 3)], True, id="one-leaf-rows"),
    pytest.param([(4, 3), (4,), (4, 2, 5)], False, id="leaves-joint"),
    pytest.param([(4, 3), (4,), (4, 2, 5)], True, id="leaves-rows"),
    pytest.param([(), (7,), (0,)], False, id="odd-leaves-joint"),
    pytest.param([(3, ABOVE_GRAIN // 3), (3, 1)], True, id="above-grain-rows"),
    pytest.param([(ABOVE_GRAIN,)], False, id="above-grain-joint"),
]


class Step:
    """One step by a Stepper and one by the ops, over the same random slopes."""

    def __init__(
        self,
        device: torch.device,
        dtypes: tuple[torch.dtype, ...],
        shapes: list[tuple[int, ...]],
        per_sample: bool,
        tableau: ButcherTableau,
        *,
        quadratures: int = 0,
        signs: list[float] | None = None,
        norm_leaves: int | None = None,
        zero_base: bool = False,
        direction: float = 1.0,
    ):
        self.device, self.shapes, self.tableau = device, shapes, tableau
        self.dtypes = [dtypes[leaf % len(dtypes)] for leaf in range(len(shapes))]
        self.generator = torch.Generator().manual_seed(0)
        self.t = [0.0, direction * 0.05, direction * 0.1, direction * 2.0]
        self.rtol = [10.0 ** -(leaf + 1) for leaf in range(len(shapes))]
        self.atol = [10.0 ** -(leaf + 2) for leaf in range(len(shapes))]
        self.y0 = self.draw()
        self.problem = Problem(
            field=lambda t, y: y,
            leaves=self.y0,
            t=self.t,
            per_sample=per_sample,
            rtol=self.rtol,
            atol=self.atol,
            quadratures=quadratures,
            signs=signs,
        )
        self.n, self.rows = len(shapes) - quadratures, self.problem.rows
        self.counted = len(shapes) if norm_leaves is None else norm_leaves
        self.signs, self.zero_base = signs or [1.0] * len(shapes), zero_base
        self.constants = StepControl().constants(tableau.order)
        self.rows_a = tableau.a[1:]
        self.stepper = Stepper(self.problem, tableau, self.rows_a, self.constants, norm_leaves, zero_base)
        self.kernels = self.stepper.kernels
        stops = [[direction * 0.1, direction * 2.0], [float(STOPS["step"]), float(STOPS["end"])]]
        self.stops = torch.tensor(stops, dtype=torch.float64, device=device)
        self.outputs = torch.tensor(self.t, dtype=torch.float64, device=device)
        state = torch.from_numpy(initial_state(0.0, self.rows, direction)).to(device)
        sizes = torch.linspace(0.1, 0.06, self.rows, dtype=torch.float64) if per_sample else torch.tensor([0.1])
        state[FIELDS["dt"]] = state[FIELDS["step_end"]] = direction * sizes.to(state)
        self.stepper.bind_state(state, self.stops, self.outputs)
        self.state, self.expected_state = state, state.clone()
        self.expected_times = torch.empty_like(self.stepper.times)
        self.k: list[list[Tensor]] = [self.draw() for _ in range(tableau.stages)]

    def draw(self) -> list[Tensor]:
        return [
            torch.randn(shape, generator=self.generator, dtype=torch.complex128 if dtype.is_complex else torch.float64)
            .to(dtype)
            .to(self.device)
            for shape, dtype in zip(self.shapes, self.dtypes, strict=True)
        ]

    def outputs_of(self, leaves: int) -> list[Tensor]:
        """Outputs to be written, of the first leaves."""
        kinds = list(zip(self.shapes, self.dtypes, strict=True))[:leaves]
        return [torch.full((len(self.t), *shape), SENTINEL, dtype=dtype, device=self.device) for shape, dtype in kinds]

    @property
    def dt(self) -> Tensor:
        return self.expected_state[FIELDS["dt"]]

    def slopes(self, leaf: int, count: int) -> list[Tensor]:
        return [of_stage[leaf] for of_stage in self.k[:count]]

    def combination(self, leaf: int, weights: tuple[float, ...]) -> Tensor:
        """The op's linear combination of the slopes of a leaf."""
        y = torch.empty_like(self.y0[leaf])
        base = [] if self.zero_base else [self.y0[leaf]]
        signed = [weight * self.signs[leaf] for weight in weights]
        ops.stage([y], base, self.slopes(leaf, len(weights)), signed, self.dt)
        return y

    def run_stages(self) -> None:
        """Every stage of the stepper; compares each."""
        self.kernels.bind_slopes(0, self.stepper.set_slopes(0, list(self.k[0]), False))
        addresses: list[int] = []
        for i, row in enumerate(self.rows_a, start=1):
            self.kernels.stage(i, addresses)
            for leaf in range(self.n):
                assert torch.equal(self.stepper.y[i][leaf], self.combination(leaf, row)), f"stage {i}, leaf {leaf}"
            addresses = self.stepper.set_slopes(i, list(self.k[i]), False)
        self.last_addresses = addresses

    def ends(self) -> list[Tensor]:
        """The end of the step by the ops."""
        ends = [self.combination(leaf, self.rows_a[-1]) for leaf in range(self.n)]
        return [*ends, *(self.combination(leaf, self.tableau.b) for leaf in range(self.n, len(self.shapes)))]

    def expected_error(self) -> None:
        counted, stages = self.counted, self.tableau.stages
        slopes = [slope for leaf in range(counted) for slope in self.slopes(leaf, stages)]
        tolerances = self.rtol[:counted], self.atol[:counted]
        ratio = self.expected_state[FIELDS["error_ratio"]]
        ops.error(ratio, self.y0[:counted], self.ends()[:counted], slopes, self.tableau.e, self.dt, *tolerances)


@pytest.fixture(params=TYPES)
def dtypes(request) -> tuple[torch.dtype, ...]:
    """The element types of the leaves, in turn."""
    return request.param


@pytest.mark.parametrize("method", methods.EXPLICIT)
@pytest.mark.parametrize(("shapes", "per_sample"), LEAVES)
def test_step_is_that_of_the_ops(device, dtypes, method, shapes, per_sample):
    """Stages, error ratio, controller, outputs and advance, one after the other, bit for bit; with the last, the first stage of
    the next step."""
    if max(math.prod(shape) for shape in shapes) > 1000 and method not in ("dopri5", "dopri8"):
        pytest.skip("few and many slopes are enough for many elements")
    tableau = methods.EXPLICIT[method]
    step = Step(device, dtypes, shapes, per_sample, tableau)
    step.run_stages()
    ends = step.ends()
    step.kernels.error(step.last_addresses)
    step.expected_error()
    assert torch.equal(step.state, step.expected_state)
    ratio = step.state[FIELDS["error_ratio"]]
    assert bool((ratio > 0).all())
    for state in (step.state, step.expected_state):  # so that rows with an even number accept, the others reject
        state[FIELDS["error_ratio"]] = torch.arange(step.rows, dtype=torch.float64, device=device) % 2 * 7 + 0.5
    step.kernels.step_size()
    ops.step_size(step.expected_state, step.expected_times, step.stops, step.outputs, tableau.c, step.constants)
    assert torch.equal(step.state, step.expected_state)
    assert torch.equal(step.stepper.times, step.expected_times)
    assert step.state[FIELDS["accept"]].tolist() == [float(row % 2 == 0) for row in range(step.rows)]

    ys, expected_ys = step.outputs_of(len(shapes)), step.outputs_of(len(shapes))
    step.kernels.dense_output([out.data_ptr() for out in ys])
    slopes = [x for leaf in range(len(shapes)) for x in step.slopes(leaf, tableau.stages)]
    p = [number for row in tableau.p for number in row]
    ops.dense_output(expected_ys, step.y0, ends, slopes, p, len(tableau.p[0]), step.expected_state, step.outputs)
    for out, expected in zip(ys, expected_ys, strict=True):
        assert torch.equal(out, expected)
        assert out.numel() == 0 or bool((out[1] != SENTINEL).any())

    y0, k0 = [leaf.clone() for leaf in step.y0], [slope.clone() for slope in step.k[0]]
    ops.advance(y0, k0, ends, step.k[-1], step.expected_state[FIELDS["accept"]])
    y = [torch.empty_like(leaf) for leaf in y0]
    ops.stage(y, y0, k0, tableau.rows[0], step.expected_state[FIELDS["dt"]])
    for kernel in ("advance", "advance_and_stage"):  # the second moves to the same place again
        getattr(step.kernels, kernel)()
        for leaf in range(len(shapes)):
            assert torch.equal(step.stepper.y0[leaf], y0[leaf])
            assert torch.equal(step.k[0][leaf], k0[leaf])
    for leaf in range(len(shapes)):
        assert torch.equal(step.stepper.y[1][leaf], y[leaf])


QUADRATURES = [
    pytest.param(None, id="in-the-norm"),
    pytest.param(2, id="out-of-the-norm"),
]


@pytest.mark.parametrize("norm_leaves", QUADRATURES)
@pytest.mark.parametrize("call", ["error", "quadrature"])
@pytest.mark.parametrize("per_sample", [False, True], ids=["joint", "rows"])
def test_quadratures(device, dtypes, norm_leaves, call, per_sample):
    """Leaves without stages end in the combination with b, and count in the error norm or not."""
    tableau = methods.DOPRI5
    shapes = [(4, 3), (4,), (4, 2, 5), (4, 1)]
    step = Step(device, dtypes, shapes, per_sample, tableau, quadratures=2, norm_leaves=norm_leaves)
    step.run_stages()
    assert len(step.stepper.q1) == 2 and all(len(leaves) == 2 for leaves in step.stepper.y)
    getattr(step.kernels, call)(step.last_addresses)
    ends = step.ends()
    for leaf in (2, 3):
        assert torch.equal(step.stepper.q1[leaf - 2], ends[leaf])
    if call == "error":
        step.expected_error()
    assert torch.equal(step.state, step.expected_state)


def test_quadratures_decide_the_norm_where_they_count(device):
    """With the largest error in a quadrature, the ratio differs between counting it and not."""
    ratios = []
    for norm_leaves in (None, 1):
        step = Step(device, (torch.float64,), [(3,), (5,)], False, methods.BOSH3, quadratures=1, norm_leaves=norm_leaves)
        for of_stage in step.k:
            of_stage[1].mul_(1e3)
        step.run_stages()
        step.kernels.error(step.last_addresses)
        ratios.append(float(step.state[FIELDS["error_ratio"]]))
    assert ratios[0] > ratios[1]


@pytest.mark.parametrize("per_sample", [False, True], ids=["joint", "rows"])
@pytest.mark.parametrize("direction", [1.0, -1.0], ids=["forwards", "backwards"])
def test_signs(device, dtypes, per_sample, direction):
    """A leaf of sign -1 takes the step that the negated slopes give it; its error does not change."""
    shapes, signs, tableau = [(4, 3), (4,), (4, 2)], [1.0, -1.0, -1.0], methods.TSIT5
    signed = Step(device, dtypes, shapes, per_sample, tableau, quadratures=1, signs=signs, direction=direction)
    plain = Step(device, dtypes, shapes, per_sample, tableau, quadratures=1, direction=direction)
    for of_stage in plain.k:
        for slope, sign in zip(of_stage, signs, strict=True):
            slope.mul_(sign)
    outputs = []
    for step in (signed, plain):
        step.run_stages()
        step.kernels.error(step.last_addresses)
        step.state[FIELDS["error_ratio"]] = 0.5
        step.kernels.step_size()
        ys = step.outputs_of(2)
        step.kernels.dense_output([out.data_ptr() for out in ys])
        outputs.append([*step.stepper.y[-1], *step.stepper.q1, *ys, step.state])
    for x, y in zip(*outputs, strict=True):
        assert torch.equal(x, y)
    assert bool((outputs[0][3][1] != SENTINEL).all())


@pytest.mark.parametrize("per_sample", [False, True], ids=["joint", "rows"])
def test_zero_base(device, dtypes, per_sample):
    """Combinations are added to zero, and y0 is not read."""
    step = Step(device, dtypes, [(4, 3), (4,)], per_sample, methods.DOPRI5, zero_base=True, quadratures=1)
    for leaf in step.stepper.y0:
        leaf.fill_(float("nan"))
    step.run_stages()
    step.kernels.quadrature(step.last_addresses)
    assert torch.equal(step.stepper.q1[0], step.combination(1, step.tableau.b))
    assert bool(torch.isfinite(step.stepper.q1[0]).all())


def test_bound_dt(device, dtypes):
    """bind_dt takes the step size from elsewhere than the solver state."""
    step = Step(device, dtypes, [(5,)], False, methods.BOSH3)
    dt = torch.tensor([0.25], dtype=torch.float64, device=device)
    step.kernels.bind_dt(dt.data_ptr())
    step.expected_state[FIELDS["dt"]] = dt
    step.run_stages()


@pytest.mark.parametrize("phase", [0, 1], ids=["phase-0", "phase-1"])
@pytest.mark.parametrize("size", [0.0, 0.03], ids=["chosen", "given"])
@pytest.mark.parametrize("per_sample", [False, True], ids=["joint", "rows"])
def test_first_step_is_that_of_the_ops(device, dtypes, phase, size, per_sample):
    """The first step and its stage times, bit for bit."""
    step = Step(device, dtypes, [(4, 3)], per_sample, methods.DOPRI5)
    norms = torch.linspace(0.5, 3.0, 3 * step.rows, dtype=torch.float64, device=device).reshape(3, step.rows)
    step.stepper.times.fill_(SENTINEL)
    step.kernels.first_step(norms.data_ptr(), size, phase)
    tables = step.stops, step.outputs, step.tableau.c, step.constants
    ops.first_step(step.expected_state, step.expected_times, norms, *tables, size, phase)
    assert torch.equal(step.state, step.expected_state)
    assert torch.equal(step.stepper.times, step.expected_times)


def test_swap_accepted(device, dtypes):
    """After a swap the next step begins at the end of the last, with its last slope, and writes into other memory."""
    step = Step(device, dtypes, [(4, 3), (5,)], False, methods.BOSH3, quadratures=1)
    step.run_stages()
    step.kernels.error(step.last_addresses)
    ends, last = step.ends(), step.k[-1]
    step.stepper.swap_accepted()
    for leaf, end in enumerate(ends):
        assert torch.equal(step.stepper.y0[leaf], end)
    assert all(x is y for x, y in zip(step.stepper.k[0], last, strict=True))
    step.y0, step.k = ends, [last, *(step.draw() for _ in step.rows_a)]
    addresses: list[int] = []
    for i, row in enumerate(step.rows_a, start=1):
        step.kernels.stage(i, addresses)
        assert torch.equal(step.stepper.y[i][0], step.combination(0, row))
        addresses = step.stepper.set_slopes(i, list(step.k[i]), False)
    step.kernels.error(addresses)
    step.expected_error()
    assert torch.equal(step.state, step.expected_state)
    for leaf, end in enumerate(ends):
        assert torch.equal(step.stepper.y0[leaf], end)


@pytest.mark.parametrize("copy_own", [True, False])
def test_slopes_in_a_buffer_of_the_solver(device, copy_own):
    """A slope that is the state itself is copied where asked, and a strided one is made contiguous."""
    step = Step(device, (torch.float64,), [(4, 3)], False, methods.BOSH3)
    own = step.stepper.y[1][0]
    (address,) = step.stepper.set_slopes(1, [own], copy_own)
    kept = step.stepper.k[1][0]
    assert (address != own.data_ptr()) == copy_own and address == kept.data_ptr() and torch.equal(kept, own)
    strided = torch.arange(12.0, dtype=torch.float64, device=device).reshape(3, 4).t()
    (address,) = step.stepper.set_slopes(1, [strided], copy_own)
    kept = step.stepper.k[1][0]
    assert address == kept.data_ptr() and kept.is_contiguous() and torch.equal(kept, strided)


WRONG = [
    pytest.param(lambda kernels: kernels.stage(0, []), "i must be a stage", id="stage-0"),
    pytest.param(lambda kernels: kernels.stage(4, []), "i must be a stage", id="stage-beyond-the-last"),
    pytest.param(lambda kernels: kernels.stage(1, [0, 0]), "k must hold one address a leaf", id="slopes"),
    pytest.param(lambda kernels: kernels.dense_output([]), "ys must hold one address a leaf", id="outputs"),
    pytest.param(lambda kernels: kernels.bind_buffers([], [], [], 0), "y0 must hold one address a leaf", id="buffers"),
]


@pytest.mark.parametrize(("call", "message"), WRONG)
def test_wrong_addresses(call, message):
    """What the number of addresses gives away is refused."""
    step = Step(torch.device("cpu"), (torch.float64,), [(3,)], False, methods.BOSH3)
    with pytest.raises(ValueError, match=message):
        call(step.kernels)


@pytest.mark.parametrize("stage", [-1, 4], ids=["before-the-first", "after-the-last"])
def test_slopes_of_no_stage(stage):
    """Slopes are bound to stages that there are."""
    step = Step(torch.device("cpu"), (torch.float64,), [(3,), (3,), (3,)], False, methods.BOSH3)
    # Addresses of 0 keep what was there, so that nothing is written however the call goes.
    with pytest.raises(ValueError, match="stage"):
        step.kernels.bind_slopes(stage, [0, 0, 0])

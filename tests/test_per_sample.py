"""step_control="per_sample": every sample has its own steps."""

import math
import warnings

import pytest
import torch
from problems import ADAPTIVE_METHODS, FIXED_METHODS, PROBLEMS, Recording, VanDerPol

from odenet_cuda import SolverError, solve

MU = torch.tensor([0.1, 20.0, 1.0, 5.0, 10.0], dtype=torch.float64)[:, None]
START = torch.tensor([[2.0, 0.0], [1.9, 0.1], [2.1, -0.2], [1.8, 0.0], [2.0, 0.3]], dtype=torch.float64)
TIMES = torch.tensor([0.0, 1.0, 2.5, 6.0], dtype=torch.float64)
PER_SAMPLE = {"step_control": "per_sample"}
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128]
CLOSE_COUNT = 0.1  # steps alone and in a batch may differ by a tenth
SOLVED = 1e-6  # of a solve at the default tolerances
GRADIENT = 1e-6  # of a solve at 1e-10


@pytest.mark.parametrize("method", ["dopri5", "dopri8", "tsit5", "bosh3"])
def test_each_row_takes_the_steps_it_takes_alone(method):
    """Rows from easy to stiff: steps of each within a tenth of those of that row solved alone under joint control."""
    batch = solve(VanDerPol(MU), START, TIMES, method=method, rtol=1e-6, atol=1e-6, **PER_SAMPLE)
    assert batch.stats.num_accepted.shape == batch.stats.num_rejected.shape == (5,)
    assert batch.status == ["success"] * 5
    for i in range(5):
        alone = solve(VanDerPol(MU[i : i + 1]), START[i : i + 1], TIMES, method=method, rtol=1e-6, atol=1e-6)
        for name in ("num_accepted", "num_rejected"):
            expected = getattr(alone.stats, name)
            assert abs(int(getattr(batch.stats, name)[i]) - expected) <= max(1, CLOSE_COUNT * expected)
        torch.testing.assert_close(batch.ys[:, i], alone.ys[:, 0], rtol=1e-4, atol=1e-4)
    accepted = batch.stats.num_accepted
    assert accepted.max() > 2 * accepted.min()


@pytest.mark.parametrize("gradient", [None, "direct", "adjoint", "checkpoint", "quadrature"])
@pytest.mark.parametrize("method", ADAPTIVE_METHODS)
def test_a_row_does_not_depend_on_its_batch(method, gradient):
    """The same bits alone, in pairs, in another order, and in the whole batch, recorded or not."""
    options = {"method": method, "rtol": 1e-4, "atol": 1e-4, "gradient": gradient or "direct", **PER_SAMPLE}
    whole = solve(VanDerPol(MU), START, TIMES, **options)
    for rows in ([0], [1], [2, 4], [4, 3, 2, 1, 0], [3, 3]):
        y0 = START[rows].requires_grad_(gradient is not None)
        part = solve(VanDerPol(MU[rows]), y0, TIMES, **options)
        assert torch.equal(part.ys, whole.ys[:, rows])
        assert torch.equal(part.stats.num_accepted, whole.stats.num_accepted[rows])


@pytest.mark.parametrize("gradient", [None, "direct", "adjoint", "checkpoint", "quadrature"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_a_row_of_any_type_does_not_depend_on_its_batch(dtype, gradient):
    """The same bits and the same gradients alone and in the whole batch, in every type."""
    rates = torch.tensor([[0.1], [5.0], [-0.5], [2.0]], dtype=torch.float64).to(dtype.to_real())
    start = torch.tensor([[1.0, 0.5], [2.0, -1.0], [-0.25, 0.75], [1.5, 1.25]], dtype=torch.float64).to(dtype)
    tol = 1e-2 if torch.finfo(dtype).bits == 16 else 1e-4
    options = {"rtol": tol, "atol": tol, "gradient": gradient or "direct", **PER_SAMPLE}

    def solved(rows: list[int]):
        y0, rate = start[rows].requires_grad_(gradient is not None), rates[rows]

        def func(t, y):  # of real products alone, which torch rounds alike wherever in a vector they fall
            if not dtype.is_complex:
                return -(rate * (1 + t)) * y
            return torch.view_as_complex(-(rate * (1 + t))[..., None] * torch.view_as_real(y))

        solution = solve(func, y0, [0.0, 0.3, 1.0], **options)
        grad = torch.autograd.grad(solution.ys.real.sum(), y0)[0] if gradient else y0
        return solution.ys, grad, solution.stats.num_accepted

    ys, grad, accepted = solved([0, 1, 2, 3])
    assert ys.dtype == dtype and len(set(accepted.tolist())) > 1
    for rows in ([0], [1], [3, 2]):
        part = solved(rows)
        assert torch.equal(part[0], ys[:, rows]) and torch.equal(part[1], grad[rows]) and torch.equal(part[2], accepted[rows])


@pytest.mark.parametrize("sign", [1, -1], ids=["forwards", "backwards"])
@pytest.mark.parametrize("name", ["decay", "logistic", "cosine"])
@pytest.mark.parametrize("method", ADAPTIVE_METHODS)
def test_values(method, name, sign):
    """Exact solutions, where every element is a sample of its own."""
    problem = PROBLEMS[name]
    low_order = method in ("bosh3", "fehlberg2", "adaptive_heun")
    tol = 1e-6 if low_order else 1e-9
    t = sign * torch.linspace(0.0, 2.0, 7, dtype=torch.float64)
    solution = solve(problem.func, problem.y0.reshape(-1, 1), t, method=method, rtol=tol, atol=tol, **PER_SAMPLE)
    exact = problem.exact(t).reshape(7, -1, 1)
    # As in test_solve.py: fehlberg2 underestimates its error; interpolants err more than the ends of long steps.
    error = ((solution.ys - exact).abs() / (1 + exact.abs())).amax((1, 2)) / tol
    assert error[-1] <= (1000 if method == "fehlberg2" else 10)
    assert error.max() <= (1000 if method == "fehlberg2" else 100)
    assert torch.equal(solution.y_last, solution.ys[-1])


def test_devices(device):
    """The same on every device."""
    solution = solve(VanDerPol(MU.to(device)), START.to(device), TIMES.to(device), **PER_SAMPLE)
    reference = solve(VanDerPol(MU), START, TIMES, method="dopri8", rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(solution.ys[-1].cpu(), reference.ys[-1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(4,), (4, 3), (4, 4), (4, 3, 2)], ids=str)
def test_time_has_the_rank_of_the_state(shape):
    """t is [batch, 1, ...] in y's type with a time for each row, also where the batch is as large as the width."""
    rate = torch.arange(1.0, 5.0).double().reshape(-1, *[1] * (len(shape) - 1))
    func = Recording(lambda t, y: y * torch.cos(rate * t))
    y0 = torch.linspace(0.5, 1.5, math.prod(shape), dtype=torch.float64).reshape(shape)
    ys = solve(func, y0, [0.0, 1.0, 2.0], **PER_SAMPLE).ys
    t = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64).reshape(-1, *[1] * len(shape))
    torch.testing.assert_close(ys, y0 * torch.exp(torch.sin(rate * t) / rate), rtol=SOLVED, atol=SOLVED)
    assert {(tuple(seen.shape), seen.dtype) for seen in func.seen} == {((4, *[1] * (len(shape) - 1)), torch.float64)}
    assert any(len(seen.unique()) > 1 for seen in func.seen)


@pytest.mark.parametrize("width", [2, 3], ids=["batch = width", "batch < width"])
def test_fields_that_concatenate_the_time(width):
    """``torch.ones_like(y[:, :1]) * t`` works as it does with a 0-dimensional t, and means each row's own time."""

    def func(t, y):
        time = torch.ones_like(y[:, :1]) * t
        joined = torch.cat([y, time], dim=1)
        return -joined[:, :-1] * joined[:, -1:]

    y0 = torch.tensor([[1.0, 2.0, 3.0], [0.1, 50.0, -4.0]], dtype=torch.float64)[:, :width]
    ys = solve(func, y0, [0.0, 1.0, 2.0], **PER_SAMPLE).ys
    t = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)[:, None, None]
    torch.testing.assert_close(ys, y0 * torch.exp(-t * t / 2), rtol=SOLVED, atol=SOLVED)
    torch.testing.assert_close(ys, solve(func, y0, [0.0, 1.0, 2.0]).ys, rtol=SOLVED, atol=SOLVED)


def test_batch_of_one_is_the_joint_solve():
    """One sample has the steps of joint control, bit for bit."""
    joint = solve(VanDerPol(MU[3:4]), START[3:4], TIMES)
    single = solve(VanDerPol(MU[3:4]), START[3:4], TIMES, **PER_SAMPLE)
    assert torch.equal(joint.ys, single.ys)
    assert int(single.stats.num_accepted[0]) == joint.stats.num_accepted
    assert int(single.stats.num_rejected[0]) == joint.stats.num_rejected
    assert single.stats.nfe == joint.stats.nfe


def test_several_leaves():
    """Leaves of other ranks: t has the rank of the first; the error of a sample is the largest of its leaves."""
    rate = torch.tensor([0.5, 8.0, 2.0], dtype=torch.float64)
    shapes = {"x": (3, 2), "z": (3, 1, 2), "w": (3,)}
    y0 = {name: torch.full(shape, float(name != "w"), dtype=torch.float64) for name, shape in shapes.items()}

    def func(t, y):
        assert t.shape == (3, 1)
        return {"x": -rate[:, None] * y["x"], "z": rate[:, None, None] * -y["z"], "w": t[:, 0]}

    t = torch.tensor([0.0, 0.7, 2.0], dtype=torch.float64)
    ys = solve(func, y0, t, **PER_SAMPLE).ys
    decayed = torch.exp(-rate * t[:, None])
    torch.testing.assert_close(ys["x"], decayed[..., None].expand(3, 3, 2), rtol=0, atol=SOLVED)
    torch.testing.assert_close(ys["z"], decayed[..., None, None].expand(3, 3, 1, 2), rtol=0, atol=SOLVED)
    torch.testing.assert_close(ys["w"], (t * t / 2)[:, None].expand(3, 3), rtol=0, atol=SOLVED)


def test_tolerances_and_norm_of_each_row():
    """Tensor tolerances and a user's norm that gives one number a sample work row by row."""
    options = {"rtol": 1e-6, "atol": 1e-6, **PER_SAMPLE}
    own = solve(VanDerPol(MU), START, TIMES, **options)
    normed = solve(VanDerPol(MU), START, TIMES, norm=lambda y: y.square().mean(1).sqrt(), **options)
    tensors = solve(VanDerPol(MU), START, TIMES, **{**options, "rtol": torch.full((5, 1), 1e-6).double()})
    for other in (normed, tensors):
        assert torch.equal(other.stats.num_accepted, own.stats.num_accepted)
        torch.testing.assert_close(other.ys, own.ys, rtol=1e-6, atol=1e-6)
    loose = torch.tensor([1e-6, 1e-3, 1e-6, 1e-6, 1e-6], dtype=torch.float64)[:, None]
    row = solve(VanDerPol(MU), START, TIMES, **{**options, "rtol": loose, "atol": loose})
    assert row.stats.num_accepted[1] < own.stats.num_accepted[1]
    assert torch.equal(row.stats.num_accepted[2:], own.stats.num_accepted[2:])


def test_limits_and_stops_of_each_row():
    """first_step, max_step, step_t and a limit on the steps hold for each sample."""
    func = Recording(VanDerPol(MU))
    solution = solve(func, START, TIMES, first_step=0.01, max_step=0.05, step_t=[0.33], rtol=1e-3, atol=1e-3, **PER_SAMPLE)
    assert (solution.stats.num_accepted >= 6.0 / 0.05).all()
    assert 0.33 in func.times and max(func.times) == 6.0
    limited = solve(VanDerPol(MU), START, [0.0, 6.0], max_num_steps=60, on_failure="return", **PER_SAMPLE)
    enough = solve(VanDerPol(MU), START, [0.0, 6.0], **PER_SAMPLE).stats
    expected = (enough.num_accepted + enough.num_rejected <= 60).tolist()
    assert True in expected and False in expected
    assert limited.status == ["success" if fine else "max_num_steps exceeded" for fine in expected]
    assert limited.ys[-1].isnan().all(1).tolist() == [not fine for fine in expected]


# ---- one bad sample ----


def test_a_sample_that_is_not_a_number_is_named():
    """The error says which sample failed, and has the last accepted states of all."""
    y0 = START.clone()
    y0[3, 0] = math.nan
    with pytest.raises(SolverError, match=r"non-finite values in state `y`.*in sample 3 of 5 \(1 failed\)") as caught:
        solve(VanDerPol(MU), y0, TIMES, **PER_SAMPLE)
    assert caught.value.sample == 3 and caught.value.status == "non-finite values" and caught.value.t == 0.0
    assert caught.value.y.shape == (5, 2)


@pytest.mark.parametrize("gradient", [None, "direct", "adjoint", "checkpoint", "quadrature"])
def test_other_samples_finish_beside_a_bad_one(gradient):
    """With on_failure="return" the other rows are what they are without the bad one."""
    y0 = START.clone()
    y0[3, 0] = math.nan
    good = [0, 1, 2, 4]
    options = {"gradient": gradient or "direct", **PER_SAMPLE}
    solution = solve(VanDerPol(MU), y0.requires_grad_(gradient is not None), TIMES, on_failure="return", **options)
    assert solution.status == ["success", "success", "success", "non-finite values", "success"]
    assert torch.equal(solution.ys[:, good], solve(VanDerPol(MU[good]), START[good], TIMES, **options).ys)
    assert solution.ys[1:, 3].isnan().all()


def test_a_sample_that_blows_up_on_the_way():
    """y' = y**2 has its pole at 1 / y0: the rows before it finish, the others are NaN from there on."""
    y0 = torch.tensor([[0.1], [2.0], [0.2], [0.7]], dtype=torch.float64)
    t = torch.tensor([0.0, 0.4, 1.0, 2.0], dtype=torch.float64)
    solution = solve(lambda t, y: y * y, y0, t, max_num_steps=2000, on_failure="return", **PER_SAMPLE)
    exact = y0 / (1 - y0 * t[:, None, None])
    reached = torch.ones(4, 4, dtype=torch.bool)
    reached[2:, 1] = False  # pole at 0.5
    reached[3:, 3] = False  # pole at 1.43
    torch.testing.assert_close(solution.ys[..., 0][reached], exact[..., 0][reached], rtol=1e-5, atol=0)
    assert solution.ys[..., 0][~reached].isnan().all()
    assert [status == "success" for status in solution.status] == [True, False, True, False]
    assert (solution.y_last[[1, 3]] > 1e3).all()
    with pytest.raises(SolverError, match=r"in sample 1 of 4 \(2 failed\)") as caught:
        solve(lambda t, y: y * y, y0, t, max_num_steps=2000, **PER_SAMPLE)
    assert caught.value.t == pytest.approx(0.5, abs=1e-6)


# ---- gradients ----


@pytest.mark.parametrize("method", ["dopri5", "dopri8", "bosh3"])
@pytest.mark.parametrize("gradient", ["direct", "adjoint", "checkpoint", "quadrature"])
def test_gradients_of_decays(gradient, method):
    """Rates from 0.1 to 20, outputs in between: gradients by y0, the shared and the rows' own rates, and every t."""
    rates = torch.tensor([0.1, 20.0, 3.0], dtype=torch.float64)[:, None]
    own, shared = rates.clone().requires_grad_(), torch.ones(2, dtype=torch.float64, requires_grad=True)
    y0 = torch.tensor([[1.0, 2.0], [1.5, -1.0], [0.5, 1.0]], dtype=torch.float64, requires_grad=True)
    t = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64, requires_grad=True)
    weights = torch.cos(torch.arange(18, dtype=torch.float64)).reshape(3, 3, 2)
    tol = 1e-9 if method == "bosh3" else 1e-11
    ys = solve(lambda t, y: -own * shared * y, y0, t, method=method, gradient=gradient, rtol=tol, atol=tol, **PER_SAMPLE).ys
    found = torch.autograd.grad((ys * weights).sum(), (y0, t, own, shared))
    exact = y0 * torch.exp(-own * shared * (t - t[0])[:, None, None])
    expected = torch.autograd.grad((exact * weights).sum(), (y0, t, own, shared))
    for mine, true in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, true, rtol=GRADIENT, atol=GRADIENT)


def test_direct_and_adjoint_gradients_agree_on_van_der_pol():
    """Two independent computations of the gradient of a nonlinear field with rows of very different steps."""
    found = []
    for gradient in ("direct", "adjoint"):
        mu, y0 = MU[[0, 2, 3]].clone().requires_grad_(), START[[0, 2, 3]].clone().requires_grad_()
        t = TIMES[:3].clone().requires_grad_()
        ys = solve(VanDerPol(mu), y0, t, gradient=gradient, rtol=1e-11, atol=1e-11, **PER_SAMPLE).ys
        found.append(torch.autograd.grad(ys[1:].square().sum(), (mu, y0, t)))
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=GRADIENT)


@pytest.mark.parametrize("gradient", ["direct", "adjoint", "checkpoint", "quadrature"])
def test_gradients_of_several_leaves(gradient):
    """A tuple state, one leaf of rank one."""
    rate = torch.tensor([0.5, 6.0, 2.0], dtype=torch.float64, requires_grad=True)
    x0, w0 = (
        torch.ones(3, 2, dtype=torch.float64, requires_grad=True),
        torch.ones(3, dtype=torch.float64, requires_grad=True),
    )
    func = lambda t, y: (-rate[:, None] * y[0], y[0].sum(1))  # noqa: E731
    x, w = solve(func, (x0, w0), [0.0, 0.5, 1.0], gradient=gradient, rtol=1e-10, atol=1e-10, **PER_SAMPLE).ys
    found = torch.autograd.grad(x[1].sum() + w[-1].square().sum(), (rate, x0, w0))
    exact_x = x0 * torch.exp(-rate / 2)[:, None]
    exact_w = w0 + x0.sum(1) * (1 - torch.exp(-rate)) / rate
    expected = torch.autograd.grad(exact_x.sum() + exact_w.square().sum(), (rate, x0, w0))
    for mine, true in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, true, rtol=GRADIENT, atol=GRADIENT)


@pytest.mark.parametrize("gradient", ["direct", "adjoint", "checkpoint", "quadrature"])
def test_gradient_of_the_good_rows_beside_a_bad_one(gradient):
    """A row that failed leaves the gradients of the others, which do not use it, as they are."""
    y0 = torch.tensor([[1.0], [math.nan], [3.0]], dtype=torch.float64, requires_grad=True)
    solution = solve(lambda t, y: -y, y0, [0.0, 1.0], gradient=gradient, on_failure="return", **PER_SAMPLE)
    solution.ys[-1, [0, 2]].sum().backward()
    torch.testing.assert_close(y0.grad[[0, 2]], torch.full((2, 1), math.exp(-1)).double(), rtol=SOLVED, atol=SOLVED)


# ---- arguments ----


def test_state_without_samples():
    """A state without an axis has no samples."""
    with pytest.raises(ValueError, match="needs samples on axis 0 of every leaf of y0; leaf 0"):
        solve(lambda t, y: -y, torch.tensor(1.0), [0.0, 1.0], **PER_SAMPLE)
    with pytest.raises(ValueError, match="needs samples on axis 0 of every leaf of y0; leaf 1"):
        solve(lambda t, y: y, (torch.ones(2), torch.tensor(1.0)), [0.0, 1.0], **PER_SAMPLE)


def test_unequal_batches():
    """Every leaf must have as many samples."""
    with pytest.raises(ValueError, match=r"as many samples in every leaf of y0, got \[2, 3\]"):
        solve(lambda t, y: y, (torch.ones(2), torch.ones(3)), [0.0, 1.0], **PER_SAMPLE)


@pytest.mark.parametrize("method", FIXED_METHODS)
def test_fixed_methods_have_no_step_control(method):
    """A fixed method is refused, forwards and for the adjoint."""
    with pytest.raises(ValueError, match=f"per_sample.*needs an adaptive method, got '{method}'"):
        solve(lambda t, y: -y, torch.ones(2, 1), [0.0, 1.0], method=method, **PER_SAMPLE)
    with pytest.raises(ValueError, match=f"per_sample.*needs an adaptive adjoint_method, got '{method}'"):
        solve(lambda t, y: -y, torch.ones(2, 1), [0.0, 1.0], gradient="adjoint", adjoint_method=method, **PER_SAMPLE)


@pytest.mark.parametrize("method", ["dopri5", "bosh3", "vern7", "rodas5p", "kvaerno5", "auto"])
def test_samples_that_func_couples_are_told_of(method):
    """A state of one axis whose numbers are one system, means over a batch; not what keeps samples apart, or noise."""
    y0 = torch.tensor([[1.0, 2.0], [30.0, -1.0], [-5.0, 0.1]], dtype=torch.float64)
    options = {"step_control": "per_sample", "method": method, "rtol": 1e-5, "atol": 1e-5}
    coupled = (lambda t, y: y.flip(0) - y, y0[:, 0]), (lambda t, y: y.mean(0) - y, y0)
    for func, start in coupled:
        with pytest.warns(UserWarning, match="depends on others, which are at other times"):
            solve(func, start, [0.0, 1.0], **options)
    apart = lambda t, y: -y * torch.cos(t) - 0.1 * y * y.sum(1, keepdim=True)  # noqa: E731
    noisy = lambda t, y: -y + 1e-7 * torch.rand_like(y)  # noqa: E731
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for func in (apart, noisy) if method in ("dopri5", "vern7") else (apart,):
            solve(func, y0, [0.0, 1.0], **options)
        solve(coupled[0][0], y0[:, 0], [0.0, 1.0], **{**options, "step_control": "joint"})

"""Bad arguments and failed solves: each ends at once, in words that name what is wrong."""

import math

import pytest
import torch
from problems import ADAPTIVE_METHODS, FIXED_METHODS

from odenet_cuda import ODEBlock, SolverError, odeint, odeint_adjoint, odeint_dense, solve

Y0 = torch.tensor([1.0, 2.0], dtype=torch.float64)
T = torch.tensor([0.0, 1.0], dtype=torch.float64)
LIMIT = 5000  # tries: a failing solve that goes on and on ends here, with another message


def decay(t, y):
    """y' = -y."""
    return -y


# ---- arguments ----

STATES = {
    "integers": (torch.tensor([1, 2]), TypeError, "y0 must be of one of the types float32, .*, got torch.int64"),
    "booleans": (torch.tensor([True]), TypeError, "y0 must be of one of the types .*bfloat16.*, got torch.bool"),
    "eight bits": (Y0.to(torch.float8_e5m2), TypeError, "y0 must be of one of the types .*, got torch.float8_e5m2"),
    "integer leaf": ((Y0, Y0.int()), TypeError, "leaf 1 of y0 must be of one of the types .*, got torch.int32"),
    "number": (1.0, TypeError, "y0 must be a tensor or a tuple, list or dict of tensors, got float"),
    "array": (Y0.numpy(), TypeError, "y0 must be a tensor .*, got ndarray"),
    "number in a tuple": ((Y0, 1.0), TypeError, "y0 must be a tensor or .*, got float"),
    "empty tuple": ((), ValueError, "y0 must hold at least one tensor"),
    "None": (None, (TypeError, ValueError), "y0 must"),
}


@pytest.mark.parametrize("name", STATES)
def test_initial_states(name):
    """What y0 may not be."""
    y0, error, words = STATES[name]
    with pytest.raises(error, match=words):
        solve(decay, y0, T)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=["nan", "inf", "-inf"])
@pytest.mark.parametrize("method", ADAPTIVE_METHODS)
def test_initial_states_that_are_not_finite(method, value):
    """NaN and infinity in y0 are called that, at the start, and no "underflow in dt"."""
    y0 = torch.tensor([1.0, value], dtype=torch.float64)
    words = "(y0|non-finite values in state `y`.*initial state)"
    with pytest.raises((ValueError, SolverError), match=words) as caught:
        solve(decay, y0, T, method=method, max_num_steps=LIMIT)
    if isinstance(caught.value, SolverError):
        assert caught.value.t == 0.0 and caught.value.status == "non-finite values"


TIMES = {
    "repeated": ([0.0, 1.0, 1.0], ValueError, "t must be strictly increasing or decreasing, got"),
    "non-monotone": ([0.0, 2.0, 1.0], ValueError, "t must be strictly increasing or decreasing, got"),
    "nan": ([0.0, math.nan], ValueError, "t must be finite"),
    "inf": ([0.0, math.inf], ValueError, "t must be finite"),
    "two axes": (
        torch.zeros(2, 2),
        ValueError,
        r"t must be one-dimensional with at least one time, got shape \[2, 2\]",
    ),
    "no axis": (torch.tensor(1.0), ValueError, r"t must be one-dimensional with at least one time, got shape \[\]"),
    "empty": ([], ValueError, "t must be one-dimensional with at least one time"),
    "integers": (torch.tensor([0, 1]), TypeError, "t must be a floating tensor, got torch.int64"),
    "complex": (torch.tensor([0.0, 1.0 + 1j]), TypeError, "t must be a floating tensor, got torch.complex64"),
    "words": ("soon", TypeError, "t must be a one-dimensional tensor of times, got str"),
    "None": (None, TypeError, "t must be a one-dimensional tensor of times, got NoneType"),
}


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
@pytest.mark.parametrize("name", TIMES)
def test_times(name, method):
    """What t may not be."""
    t, error, words = TIMES[name]
    with pytest.raises(error, match=words):
        solve(decay, Y0, t, method=method)


RETURNS = {
    "shape": (lambda t, y: y[:1], ValueError, r"func must return the shape of y0, \[2\], got \[1\]"),
    "one more axis": (lambda t, y: y[None], ValueError, r"func must return the shape of y0, \[2\], got \[1, 2\]"),
    "complex": (lambda t, y: y + 1j, ValueError, "func must return real numbers for a real y0, got torch.complex128"),
    "None": (lambda t, y: None, TypeError, "func must return a tensor, as y0 is one, got NoneType"),
    "number": (lambda t, y: 1.0, TypeError, "func must return a tensor, as y0 is one, got float"),
    "tuple": (lambda t, y: (y,), TypeError, "func must return a tensor, as y0 is one, got tuple"),
}


@pytest.mark.parametrize("call", ["dopri5", "rk4", "direct", "adjoint"])
@pytest.mark.parametrize("name", RETURNS)
def test_what_func_returns(name, call):
    """What func may not return for a tensor."""
    func, error, words = RETURNS[name]
    options = {"method": call} if call in ("dopri5", "rk4") else {"gradient": call}
    with pytest.raises(error, match=words):
        solve(func, Y0.clone().requires_grad_(call in ("direct", "adjoint")), T, **options)


TUPLES = {
    "tensor": (lambda t, y: y[0], (TypeError, ValueError), "func must return the structure of y0"),
    "too few": (lambda t, y: (y[0],), (TypeError, ValueError), "func must return the structure of y0"),
    "too many": (lambda t, y: (*y, y[0]), (TypeError, ValueError), "func must return the structure of y0"),
    "dict": (lambda t, y: {"x": y[0], "z": y[1]}, (TypeError, ValueError), "func must return the structure of y0"),
    "number": (lambda t, y: (y[0], 0.0), TypeError, "func must return tensors in the structure of y0, got float"),
    "None": (lambda t, y: (y[0], None), (TypeError, ValueError), "func must return .*structure of y0"),
    "shape": (
        lambda t, y: (y[0], y[1][:1]),
        ValueError,
        r"func must return the shape of y0 in leaf 1, \[3\], got \[1\]",
    ),
}


@pytest.mark.parametrize("name", TUPLES)
def test_what_func_returns_for_a_tuple(name):
    """What func may not return for a tuple of two."""
    func, error, words = TUPLES[name]
    with pytest.raises(error, match=words):
        solve(func, (Y0, torch.ones(3, dtype=torch.float64)), T)


def test_what_func_returns_for_a_dict():
    """A dict with other keys is another structure."""
    with pytest.raises((TypeError, ValueError), match="func must return the structure of y0"):
        solve(lambda t, y: {"a": y["x"]}, {"x": Y0}, T)


def test_func_that_goes_wrong_later():
    """A wrong shape that comes only after some calls is found as well."""
    with pytest.raises(ValueError, match=r"func must return the shape of y0, \[2\], got \[1\]"):
        solve(lambda t, y: -y if t < 0.5 else y[:1], Y0, T)


def test_other_floating_types_are_converted():
    """A float32 slope for a float64 state is no error: the state's type is kept."""
    ys = solve(lambda t, y: (-y).float(), Y0, T, rtol=1e-4, atol=1e-4).ys
    assert ys.dtype == torch.float64
    torch.testing.assert_close(ys[-1], Y0 * math.exp(-1), rtol=1e-3, atol=0)


def test_error_of_func_itself():
    """What func raises comes out as it is."""

    class OwnError(Exception):
        pass

    def func(t, y):
        raise OwnError("mine")

    for method in ("dopri5", "rk4"):
        with pytest.raises(OwnError, match="mine"):
            solve(func, Y0, T, method=method)


ARGUMENTS = {
    "method": ({"method": "dopri6"}, ValueError, "method must be one of .*dopri5.*; got 'dopri6'"),
    "scipy's solver": ({"method": "scipy_solver", "solver": "LSODE"}, ValueError, "solver must be one of .*'LSODA'.*'LSODE'"),
    "negative rtol": ({"rtol": -1e-3}, ValueError, "rtol must be a finite number of at least 0, got -0.001"),
    "nan rtol": ({"rtol": math.nan}, ValueError, "rtol must be a finite number of at least 0, got nan"),
    "infinite atol": ({"atol": math.inf}, ValueError, "atol must be a finite number of at least 0, got inf"),
    "negative atol": ({"atol": torch.tensor([1e-3, -1e-3])}, ValueError, "atol must be at least 0 everywhere"),
    "nan in atol": ({"atol": torch.tensor([1e-3, math.nan])}, ValueError, "atol must be at least 0 everywhere"),
    "learned rtol": ({"rtol": torch.tensor(1e-3, requires_grad=True)}, ValueError, "rtol must not require a gradient"),
    "learned atol": ({"atol": torch.tensor(1e-3, requires_grad=True)}, ValueError, "atol must not require a gradient"),
    "shape of rtol": (
        {"rtol": torch.full((3,), 1e-3)},
        ValueError,
        r"rtol must broadcast against y0, \[2\], got \[3\]",
    ),
    "shape beyond y0": (
        {"rtol": torch.full((3, 2), 1e-3)},
        ValueError,
        r"rtol must broadcast against y0, \[2\], got \[3, 2\]",
    ),
    "words for rtol": ({"rtol": "small"}, (TypeError, ValueError), "rtol must be a number or a tensor, got str"),
    "None for atol": ({"atol": None}, TypeError, "atol must be a number or a tensor, got NoneType"),
    "list for atol": ({"atol": [1e-3, 1e-3]}, TypeError, "atol must be a number or a tensor, got list"),
    "gradient": ({"gradient": "backprop"}, ValueError, "gradient must be one of .*direct.*adjoint.*, got 'backprop'"),
    "step_control": ({"step_control": "rows"}, ValueError, "step_control must be one of .*per_sample.*, got 'rows'"),
    "on_failure": ({"on_failure": "ignore"}, ValueError, "on_failure must be one of .*, got 'ignore'"),
    "controller": ({"controller": "PD"}, ValueError, "controller must be 'I', 'PI', 'PID' or three numbers, got 'PD'"),
    "two coefficients": ({"controller": (0.1, 0.2)}, ValueError, "controller must be .* three numbers"),
    "first_step 0": ({"first_step": 0.0}, ValueError, "first_step must be a positive number, got 0.0"),
    "first_step nan": ({"first_step": math.nan}, ValueError, "first_step must be a positive number, got nan"),
    "first_step inf": ({"first_step": math.inf, "max_num_steps": LIMIT}, None, ""),
    "min_step": ({"min_step": -1.0}, ValueError, "min_step must be a number from 0.0"),
    "max_step": ({"max_step": 0.0}, ValueError, "max_step must be a number from 0.0"),
    "min above max": (
        {"min_step": 1.0, "max_step": 0.5},
        ValueError,
        "min_step must not exceed max_step, 0.5, got 1.0",
    ),
    "max_num_steps": ({"max_num_steps": 0}, ValueError, "max_num_steps must be a number from 1"),
    "safety": ({"safety": 0.0}, ValueError, "safety must be a number from 0.0"),
    "ifactor": ({"ifactor": 0.5}, ValueError, "ifactor must be a number from 1.0"),
    "dfactor": ({"dfactor": 1.5}, ValueError, "dfactor must be a number from 0.0 to 1.0, got 1.5"),
    "repeated step_t": (
        {"step_t": [0.5, 0.5]},
        ValueError,
        "`step_t` and `jump_t` must not have any repeated elements",
    ),
    "repeated jump_t": (
        {"jump_t": [0.5, 0.5]},
        ValueError,
        "`step_t` and `jump_t` must not have any repeated elements",
    ),
    "both": (
        {"step_t": [0.5], "jump_t": [0.5]},
        ValueError,
        "`step_t` and `jump_t` must not have any repeated elements",
    ),
    "number for step_t": (
        {"step_t": 0.5},
        TypeError,
        "step_t must be a one-dimensional tensor or a list of times, got 0.5",
    ),
    "words for jump_t": ({"jump_t": ["now"]}, (TypeError, ValueError), "jump_t must be a one-dimensional"),
    "nan in jump_t": ({"jump_t": [math.nan]}, ValueError, "jump_t must be finite"),
    "interp": ({"method": "rk4", "interp": "spline"}, ValueError, "interp must be one of .*, got 'spline'"),
    "step_size": ({"method": "rk4", "step_size": 0.0}, ValueError, "step_size must be a positive number, got 0.0"),
    "step_size nan": (
        {"method": "rk4", "step_size": math.nan},
        ValueError,
        "step_size must be a positive number, got nan",
    ),
    "two grids": (
        {"method": "rk4", "step_size": 0.1, "grid_constructor": lambda f, y, t: t},
        ValueError,
        "step_size and grid_constructor are mutually exclusive",
    ),
    "begin of the grid": (
        {"method": "rk4", "grid_constructor": lambda f, y, t: t + 1},
        ValueError,
        "the grid of grid_constructor must begin at 0.0, got 1.0",
    ),
    "end of the grid": (
        {"method": "rk4", "grid_constructor": lambda f, y, t: 2 * t},
        ValueError,
        "the grid of grid_constructor must end at 1.0, got 2.0",
    ),
    "direction of the grid": (
        {"method": "rk4", "grid_constructor": lambda f, y, t: torch.tensor([0.0, 0.7, 0.3, 1.0])},
        ValueError,
        "the grid of grid_constructor must be strictly increasing",
    ),
    "norm": ({"norm": lambda y: y}, ValueError, r"norm must return 1 numbers, one a sample, got shape \[2\]"),
    "adjoint norm": (
        {"gradient": "adjoint", "adjoint_options": {"norm": "mean"}},
        ValueError,
        r"adjoint_options\['norm'\] must be 'seminorm' or callable, got 'mean'",
    ),
    "adjoint option": (
        {"gradient": "adjoint", "adjoint_options": {"speed": 1}},
        ValueError,
        "adjoint_options must name options of solve or 'norm', got 'speed'",
    ),
    "adjoint_method": ({"gradient": "adjoint", "adjoint_method": "dopri6"}, ValueError, "method must be one of"),
    "adjoint_rtol": ({"gradient": "adjoint", "adjoint_rtol": -1.0}, ValueError, "adjoint_rtol must be a finite number"),
    "tensor rtol with adjoint": (
        {"gradient": "adjoint", "rtol": torch.full((2,), 1e-3)},
        ValueError,
        "adjoint_rtol must be a number .*; give it beside a tensor rtol",
    ),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments(name):
    """Each argument that is wrong is named, with what it may be and what it was."""
    options, error, words = ARGUMENTS[name]
    if error is None:  # as large as one likes: the step lands on the end
        torch.testing.assert_close(solve(decay, Y0, T, **options).ys[-1], Y0 * math.exp(-1), rtol=1e-6, atol=0)
        return
    with pytest.raises(error, match=words):
        solve(decay, Y0, T, **options)


@pytest.mark.parametrize("name", ["rtol", "atol"])
def test_count_of_tolerances(name):
    """As many tolerances as leaves."""
    with pytest.raises(ValueError, match=f"{name} must be one tolerance or one for each of the 2 leaves, got 3"):
        solve(lambda t, y: y, (Y0, Y0), T, **{name: (1e-3, 1e-3, 1e-3)})


def test_func_that_is_not_callable():
    """func must be callable."""
    with pytest.raises(TypeError, match="func must be callable as func"):
        solve(3.0, Y0, T)


@pytest.mark.parametrize("function", [odeint, odeint_adjoint], ids=["odeint", "odeint_adjoint"])
def test_drop_in_functions_give_the_same_words(function):
    """Through the drop-in functions too."""
    func = torch.nn.Linear(2, 2).double()
    field = type("Field", (torch.nn.Module,), {"forward": lambda self, t, y: func(y)})()
    for arguments, words in (
        ((field, torch.tensor([1, 2]), T), "y0 must be of one of the types float32"),
        ((field, Y0, torch.tensor([0, 1])), "t must be a floating tensor"),
    ):
        with pytest.raises(TypeError, match=words):
            function(*arguments)
    with pytest.raises(ValueError, match="method must be one of"):
        function(field, Y0, T, method="dopri6")
    with pytest.raises(ValueError, match="dtype"):
        function(field, Y0, T, options={"dtype": torch.float16})


def test_dense_of_an_empty_interval():
    """odeint_dense needs two times."""
    with pytest.raises(ValueError, match="t must be strictly increasing or decreasing"):
        odeint_dense(decay, Y0, 1.0, 1.0)


# ---- failed solves ----


def check(error: SolverError, status: str, start: str, y0):
    """What every failure has: a status, where and what, a remedy, and the words torchdiffeq's users look for."""
    assert isinstance(error, AssertionError)
    message = str(error)
    assert message.startswith(start)
    assert error.status == status
    assert f"at t = {error.t:.9g}" in message and "last step tried" in message and "Remedy: " in message
    assert error.sample is None or f"in sample {error.sample} of" in message
    assert error.y.shape == y0.shape and error.solution.y_last is error.y
    assert math.isfinite(error.t) and math.isfinite(error.dt)


@pytest.mark.parametrize("step_control", ["joint", "per_sample"])
@pytest.mark.parametrize("gradient", [None, "direct", "adjoint", "checkpoint", "quadrature"])
@pytest.mark.parametrize("method", ["dopri5", "dopri8", "tsit5", "bosh3"])
def test_pole(method, gradient, step_control):
    """y' = y**2 from 1 has its pole at t = 1, where no step is small enough; the last state solves the equation."""
    y0 = torch.ones(1, 1, dtype=torch.float64, requires_grad=gradient is not None)
    options = {"method": method, "gradient": gradient or "direct", "step_control": step_control, "max_num_steps": LIMIT}
    with pytest.raises(SolverError) as caught:
        solve(lambda t, y: y * y, y0, [0.0, 2.0], rtol=1e-6, atol=1e-6, **options)
    error = caught.value
    if error.status == "underflow in dt":
        check(error, "underflow in dt", "underflow in dt ", y0)
    else:
        check(error, "non-finite values", "non-finite values in state `y`: ", y0)
    assert error.sample == (0 if step_control == "per_sample" else None)
    assert error.t == pytest.approx(1.0, abs=1e-3)
    # Near the pole the relative error of y is that of 1 - t over it: only its size can be checked.
    assert float(error.y) > 1e4 and error.y.isfinite().all()
    assert 0 < error.dt < 1e-3


@pytest.mark.parametrize("gradient", [None, "direct", "adjoint", "checkpoint", "quadrature"])
def test_too_many_steps(gradient):
    """The limit, the state that was reached, and how to go on."""
    y0 = Y0.clone().requires_grad_(gradient is not None)
    with pytest.raises(SolverError) as caught:
        solve(decay, y0, [0.0, 2.0], max_num_steps=3, gradient=gradient or "direct")
    error = caught.value
    check(error, "max_num_steps exceeded", "max_num_steps exceeded (3>=3)", y0)
    assert "raise max_num_steps" in str(error)
    torch.testing.assert_close(error.y, Y0 * math.exp(-error.t), rtol=1e-6, atol=0)
    assert 0 < error.t < 2 and error.dt > 0


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("step_control", ["joint", "per_sample"])
@pytest.mark.parametrize("method", ADAPTIVE_METHODS)
def test_field_that_is_not_finite_from_some_time_on(method, step_control, value):
    """The solve goes as far as the field is finite and says so."""
    y0 = torch.ones(2, 1, dtype=torch.float64)
    func = lambda t, y: torch.where(t < 0.5, -y, torch.full_like(y, value))  # noqa: E731
    options = {"method": method, "step_control": step_control, "max_num_steps": LIMIT}
    with pytest.raises(SolverError) as caught:
        solve(func, y0, [0.0, 1.0], rtol=1e-4, atol=1e-4, **options)
    error = caught.value
    check(error, "non-finite values", "non-finite values in state `y`: ", y0)
    assert error.sample == (0 if step_control == "per_sample" else None)
    assert error.t == pytest.approx(0.5, abs=1e-2) and error.t <= 0.5
    torch.testing.assert_close(error.y, y0 * math.exp(-error.t), rtol=1e-2, atol=0)


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("options", [{}, {"first_step": 0.1}, {"min_step": 0.1}], ids=["plain", "first_step", "min_step"])
def test_field_that_is_never_finite(options, value):
    """The first evaluation is bad already."""
    with pytest.raises(SolverError) as caught:
        solve(lambda t, y: torch.full_like(y, value), Y0, T, max_num_steps=LIMIT, **options)
    check(caught.value, "non-finite values", "non-finite values in state `y`: ", Y0)
    assert caught.value.t == 0.0 and torch.equal(caught.value.y, Y0)


@pytest.mark.parametrize("direction", [1.0, -1.0], ids=["forwards", "backwards"])
def test_underflow(direction):
    """A field that is noise cannot meet any tolerance: the step shrinks until t no longer moves."""
    generator = torch.Generator().manual_seed(0)

    def noise(t, y):
        return 1e20 * torch.randn(y.shape, generator=generator, dtype=y.dtype)

    with pytest.raises(SolverError) as caught:
        solve(noise, Y0, [1.0, 1.0 + direction], rtol=1e-12, atol=1e-12, max_num_steps=LIMIT)
    check(caught.value, "underflow in dt", "underflow in dt ", Y0)
    assert "min_step" in str(caught.value)


def test_failure_of_the_backward_solve():
    """The adjoint's own failure is a SolverError too, with its words."""
    y0 = Y0.clone().requires_grad_()
    ys = solve(decay, y0, T, gradient="adjoint", adjoint_options={"max_num_steps": 2}).ys
    with pytest.raises(SolverError, match="max_num_steps exceeded"):
        ys[-1].sum().backward()


def test_failure_in_a_structure():
    """The state of the exception has the structure of y0."""
    with pytest.raises(SolverError) as caught:
        solve(lambda t, y: {"x": -y["x"]}, {"x": Y0}, T, max_num_steps=2)
    torch.testing.assert_close(caught.value.y["x"], Y0 * math.exp(-caught.value.t), rtol=1e-6, atol=0)


def test_failure_of_a_block():
    """A layer raises as solve does."""
    with pytest.raises(SolverError, match="max_num_steps exceeded"):
        ODEBlock(decay, max_num_steps=1, first_step=0.01)(Y0)


@pytest.mark.parametrize("method", FIXED_METHODS)
def test_fixed_methods_have_no_failures(method):
    """Without an error estimate a solve that blows up ends with what it computes, as in torchdiffeq."""
    ys = solve(lambda t, y: y * y, torch.full((1,), 1e200, dtype=torch.float64), [0.0, 1.0, 2.0], method=method).ys
    assert torch.equal(ys[0], torch.full((1,), 1e200, dtype=torch.float64))
    assert not ys[-1].isfinite().any()

"""df/dy by a known pattern of zeros: colours, products, solves and their gradients, and patterns that are wrong."""

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from odenet_cuda import ODEBlock, compile, jacobian, odeint, solve
from odenet_cuda.factors import Factors
from odenet_cuda.jacobian import linearize
from odenet_cuda.sparsity import Sparsity, coloured

D = torch.float64
pytestmark = pytest.mark.usefixtures("one_thread")
METHODS = ["rodas5p", "rosenbrock23", "kvaerno5", "kvaerno3", "implicit_euler", "radauIIA5"]


def band(n: int, below: int = 1, above: int = 1) -> Tensor:
    i = torch.arange(n)
    apart = i[None, :] - i[:, None]
    return (apart >= -below) & (apart <= above)


def diffusion(t: Tensor, y: Tensor, rate: Any = 40.0) -> Tensor:
    """Fisher's equation between ends that let nothing through."""
    flow = torch.diff(torch.nn.functional.pad(torch.diff(y, dim=-1), (1, 1)), dim=-1)
    return rate * flow + y * (1 - y) * torch.cos(t)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(0, 2**32 - 1), st.sampled_from([0.1, 0.3, 0.7]))
def test_colours_share_no_column(n: int, seed: int, share: float):
    pattern = torch.rand(n, n, generator=torch.Generator().manual_seed(seed)) < share
    lines, columns = (x.tolist() for x in pattern.nonzero(as_tuple=True))
    colours = coloured(n, lines, columns)
    for colour in set(colours):
        mine = torch.tensor([c == colour for c in colours])
        assert int(pattern[mine].sum(0).max()) <= 1
    assert sorted(set(colours)) == list(range(max(colours) + 1))


@pytest.mark.parametrize(("pattern", "products"), [(band(50), 3), (band(50, 2, 1), 4), (torch.eye(9, dtype=torch.bool), 1)])
def test_products_of_bands(pattern: Tensor, products: int):
    assert len(Sparsity(pattern).directions) == products


@pytest.mark.parametrize("shape", ["band", "a dense line", "a dense column"])
def test_df_dy_is_that_of_all_products(shape: str):
    """Along lines or columns, whichever takes fewer; and differentiable where it must be."""
    pattern = band(12)
    pattern[3] |= shape == "a dense line"
    pattern[:, 3] |= shape == "a dense column"
    weights = torch.randn(12, 12, dtype=D, generator=torch.Generator().manual_seed(1)) * pattern
    field = lambda t, y, stage: [(y[0] ** 2) @ weights.T]  # noqa: E731
    sparsity = Sparsity(pattern)
    assert sparsity.by_lines == (shape != "a dense column") and len(sparsity.directions) <= 5
    y = torch.randn(3, 12, dtype=D, generator=torch.Generator().manual_seed(2), requires_grad=True)
    found, right = (
        linearize(field, torch.zeros((), dtype=D), [y], 3, by_time=False, jac=known).dy for known in (sparsity, None)
    )
    torch.testing.assert_close(found, right, rtol=1e-13, atol=1e-13)
    w = torch.randn_like(right)
    grads = [torch.autograd.grad((dy * w).sum(), y, retain_graph=True)[0] for dy in (found, right)]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("form", ["one system", "rows", "rows alone"])
def test_the_same_solve(method: str, form: str):
    """Forwards and backwards in time."""
    step = {"step_size": 0.05} if method in ("implicit_euler", "radauIIA5") else {"rtol": 1e-5, "atol": 1e-7}
    if form == "rows alone" and "step_size" in step:
        pytest.skip("no step control")
    y0 = torch.linspace(0.1, 0.9, 12, dtype=D) if form == "one system" else torch.linspace(0.1, 0.9, 12, dtype=D).reshape(2, 6)
    how: dict[str, Any] = {"method": method, "step_control": "per_sample" if form == "rows alone" else "joint", **step}
    for t in ([0.0, 0.05, 0.2], [0.0, -0.002]):
        found = solve(diffusion, y0, t, jac_sparsity=band(y0.shape[-1]).to_sparse(), **how)
        torch.testing.assert_close(found.ys, solve(diffusion, y0, t, **how).ys, rtol=1e-9, atol=1e-11)
    assert (
        odeint(diffusion, y0, torch.tensor([0.0, 0.1]), method=method, options={"jac_sparsity": band(y0.shape[-1])}).shape[0]
        == 2
    )


@pytest.mark.parametrize("method", ["rodas5p", "kvaerno5"])
@pytest.mark.parametrize("gradient", ["direct", "checkpoint", "adjoint", "quadrature"])
def test_gradients(method: str, gradient: str):
    found = []
    for sparsity in (None, band(5)):
        y0 = torch.linspace(0.1, 0.9, 5, dtype=D, requires_grad=True)
        rate = torch.tensor(2.0, dtype=D, requires_grad=True)
        how = {"method": method, "gradient": gradient, "rtol": 1e-6, "atol": 1e-8, "jac_sparsity": sparsity}
        ys = solve(diffusion, y0, [0.0, 0.2], args=(rate,), **how).ys
        found.append(torch.autograd.grad(ys[-1].square().sum(), [y0, rate]))
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-10)


def test_a_block_and_several_leaves():
    y0 = (torch.linspace(0.1, 0.9, 3, dtype=D), torch.ones(3, dtype=D))
    func = lambda t, y: (-50 * y[0] + y[1], -(y[1] ** 2))  # noqa: E731
    pattern = torch.eye(6, dtype=torch.bool)
    pattern[:3, 3:] |= torch.eye(3, dtype=torch.bool)
    how = {"method": "rodas5p", "rtol": 1e-5, "atol": 1e-7}
    for x, y in zip(
        solve(func, y0, [0.0, 1.0], jac_sparsity=pattern, **how).ys, solve(func, y0, [0.0, 1.0], **how).ys, strict=True
    ):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11)
    block = ODEBlock(diffusion, [0.0, 0.1], jac_sparsity=band(4), **how)
    assert block(torch.linspace(0.1, 0.9, 4, dtype=D)).shape == (4,)


def test_wider_than_without():
    y0 = torch.linspace(0, 1, 2100, dtype=D)
    how = {"method": "rodas5p", "rtol": 1e-1, "atol": 1e-1}
    with pytest.raises(NotImplementedError, match="up to n = 2048"):
        solve(diffusion, y0, [0.0, 1e-4], **how)
    ys = solve(diffusion, y0, [0.0, 1e-4], first_step=1e-4, jac_sparsity=band(2100).to_sparse(), **how).ys
    assert bool(ys[-1].isfinite().all())


def test_wide_systems_keep_df_dy_over_steps(monkeypatch):
    """kvaerno's, where it takes many products; a row is still what it is alone, and the next solve begins anew."""
    made, by_y = [], jacobian._by_y
    monkeypatch.setattr(jacobian, "_by_y", lambda *given: made.append(1) or by_y(*given))
    y0 = torch.linspace(0.1, 0.9, 80, dtype=D).reshape(2, 40)
    how: dict[str, Any] = {"method": "kvaerno5", "rtol": 1e-6, "atol": 1e-8, "step_control": "per_sample"}
    with torch.no_grad():
        found = solve(diffusion, y0, [0.0, 1.0], **how)
        assert len(made) < int(found.stats.num_accepted.max()) / 3
        assert torch.equal(solve(diffusion, y0, [0.0, 1.0], **how).ys, found.ys)
        alone = solve(diffusion, y0[:1], [0.0, 1.0], **how)
        torch.testing.assert_close(alone.ys[:, 0], found.ys[:, 0], rtol=1e-12, atol=1e-14)
        right = solve(diffusion, y0, [0.0, 1.0], **{**how, "method": "rodas5p", "rtol": 1e-9, "atol": 1e-11})
    torch.testing.assert_close(found.ys, right.ys, rtol=1e-5, atol=1e-6)


# ---- narrow patterns, in blocks ----


@settings(max_examples=15, deadline=None)
@given(st.integers(128, 400), st.integers(0, 6), st.integers(0, 2**32 - 1), st.booleans())
def test_systems_of_a_narrow_pattern(n: int, width: int, seed: int, apart: bool):
    """In any order of the numbers, also where these fall apart into several chains."""
    generator = torch.Generator().manual_seed(seed)
    pattern = band(n, width, width)
    if apart:
        pattern[n // 3 :, : n // 3] = pattern[: n // 3, n // 3 :] = False
    order = torch.randperm(n, generator=generator)
    sparsity = Sparsity(pattern[order][:, order])
    assert sparsity.blocks is not None
    dy = torch.randn(2, n, n, dtype=D, generator=generator) * pattern[order][:, order]
    c, right = torch.tensor([0.05, 0.3], dtype=D), torch.randn(2, n, dtype=D, generator=generator)
    with torch.no_grad():
        factors = Factors(dy, c, sparsity)
        found = factors.solve(right)
    assert factors.blocks is not None
    matrix = torch.eye(n, dtype=D) - c[:, None, None] * dy
    left = (matrix @ found[:, :, None])[:, :, 0] - right
    assert float(left.abs().max()) < 1e-8 * (1 + float(found.abs().max()))


def test_blocks_that_are_singular():
    """Of a matrix that is not: those systems are solved as a whole."""
    n = 132
    sparsity, ring = Sparsity(band(n)), torch.diag(torch.ones(n - 1, dtype=D), 1) + torch.diag(torch.ones(n - 1, dtype=D), -1)
    dy, right = torch.stack([torch.eye(n, dtype=D) - ring, -ring / 4]), torch.randn(2, n, dtype=D)
    with torch.no_grad():
        factors = Factors(dy, torch.ones(2, dtype=D), sparsity)
        found = factors.solve(right)
    assert factors.whole.tolist() == [True, False] and sparsity.blocks.size == 19
    matrix = torch.eye(n, dtype=D) - dy
    torch.testing.assert_close((matrix @ found[:, :, None])[:, :, 0], right, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", ["rodas5p", "kvaerno5", "bdf", "implicit_euler"])
def test_the_same_solve_in_blocks(method: str):
    y0 = torch.linspace(0.1, 0.9, 300, dtype=D).reshape(2, 150)
    step = {"step_size": 0.05} if method == "implicit_euler" else {"rtol": 1e-6, "atol": 1e-8}
    with torch.no_grad():
        found = solve(diffusion, y0, [0.0, 0.1], method=method, jac_sparsity=band(150), **step)
        right = solve(diffusion, y0, [0.0, 0.1], method=method, **step)
    torch.testing.assert_close(found.ys, right.ys, rtol=1e-5, atol=1e-6)


def test_two_species_in_two_rows():
    """Whose numbers are far apart as they lie, and near in another order."""
    one = torch.eye(100, dtype=torch.bool)
    sparsity = Sparsity(torch.cat([torch.cat([band(100), one], 1), torch.cat([one, band(100)], 1)]))
    assert sparsity.blocks is not None and len(sparsity.directions) <= 6


# ---- what ends in words ----


def test_a_pattern_that_misses_entries():
    """Also those that are 0 at the start, or show up later."""
    y0 = torch.linspace(0.1, 0.9, 6, dtype=D)
    with pytest.raises(ValueError, match="jac_sparsity must be True wherever df/dy may be other than 0: column 0"):
        solve(diffusion, y0, [0.0, 0.1], method="rodas5p", jac_sparsity=band(6, 0, 1))
    product = lambda t, y: torch.stack([-y[0] * y[1], -y[1], -y[2]])  # noqa: E731
    with pytest.raises(ValueError, match="column 1"):
        solve(product, torch.tensor([0.0, 0.0, 1.0], dtype=D), [0.0, 0.1], method="kvaerno5", jac_sparsity=torch.eye(3))
    late = lambda t, y: -y + (torch.roll(y, 1) if float(t) > 0.05 else 0 * y)  # noqa: E731
    with pytest.raises(ValueError, match="jac_sparsity must be True"):
        solve(late, y0, [0.0, 1.0], method="rodas5p", jac_sparsity=torch.eye(6))


@pytest.mark.parametrize("method", ["rodas5p", "kvaerno5", "bdf"])
def test_a_pattern_of_samples_that_func_couples(method: str):
    """df/dy of a sample alone would be the sum over samples, and steps of lower order."""
    func = lambda t, y: y.mean(0, keepdim=True) - 3 * y  # noqa: E731
    y0 = torch.linspace(0.1, 0.9, 6, dtype=D).reshape(3, 2)
    with pytest.raises(ValueError, match="couples system"):
        solve(func, y0, [0.0, 1.0], method=method, jac_sparsity=torch.eye(2))
    whole = torch.eye(2).repeat(3, 3)
    solution = solve(func, y0, [0.0, 1.0], method=method, jac_sparsity=whole, rtol=1e-8, atol=1e-8)
    mean = y0.mean(0)
    torch.testing.assert_close(solution.ys[-1], mean * math.exp(-2) + (y0 - mean) * math.exp(-3), rtol=1e-6, atol=1e-6)


def test_patterns_that_are_refused():
    y0 = torch.ones(4, 3, dtype=D)
    how: dict[str, Any] = {"method": "rodas5p", "rtol": 1e-3, "atol": 1e-3}
    for pattern, error, words in (
        ([[1]], TypeError, "jac_sparsity must be a tensor"),
        (torch.ones(3), ValueError, r"of shape|must have shape \[n, n\], got \[3\]"),
        (torch.ones(5, 5), ValueError, r"must have shape \[3, 3\] or \[12, 12\].*got \[5, 5\]"),
        (torch.ones(3, 3, requires_grad=True), ValueError, "without a gradient"),
    ):
        with pytest.raises(error, match=words):
            solve(diffusion, y0, [0.0, 1.0], jac_sparsity=pattern, **how)
    with pytest.raises(ValueError, match=r"shape \[3, 3\], a line"):
        solve(diffusion, y0, [0.0, 1.0], jac_sparsity=torch.ones(12, 12), step_control="per_sample", **how)
    with pytest.raises(ValueError, match="jac_sparsity is no option of method='dopri5'"):
        solve(diffusion, y0, [0.0, 1.0], jac_sparsity=torch.ones(3, 3))
    with pytest.raises(ValueError, match="jac and jac_sparsity must not both be given"):
        solve(diffusion, y0, [0.0, 1.0], jac=lambda t, y: y, jac_sparsity=torch.ones(3, 3), **how)
    with pytest.raises(NotImplementedError, match="up to n = 8192"):
        solve(diffusion, torch.ones(8193, dtype=D), [0.0, 1.0], jac_sparsity=torch.zeros(8193, 1).expand(8193, 8193), **how)


def test_not_under_vmap():
    known = {"jac": lambda t, y: -torch.eye(3, dtype=D)}, {"jac_sparsity": torch.eye(3)}, {"mass": torch.eye(3)}
    for what, method in itertools.product(known, ("rodas5p", "bdf")):
        if method == "rodas5p" or "mass" not in what:
            run = lambda y, what=what, method=method: solve(lambda t, y: -y, y, [0.0, 1.0], method=method, **what).ys  # noqa: E731
            with pytest.raises(NotImplementedError, match=r"(jac|jac_sparsity|mass) is not served under torch\.vmap"):
                torch.func.vmap(run)(torch.ones(2, 3, dtype=D))


def test_a_compiled_field_leaves_it_to_the_stepper():
    found = solve(compile(diffusion), torch.ones(2, 3, dtype=D), [0.0, 0.1], method="rodas5p", jac_sparsity=band(3))
    assert found.engine == "stepper" and "jac_sparsity" in found.explanation["compiled"]

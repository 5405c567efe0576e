"""Bouncing balls, each with its own bounces, in one call.

    python benchmarks/bench_events.py [--json FILE] [--runs N] [--balls N ...] [--quick]

Balls dropped from 1 to 2 m, each with its own restitution, ten bounces each: dopri5 at 1e-9, float64, one thread. Times of the
bounces must first be within 1e-9 of the closed form, and the gradients of the height half a second after the last one for the
height and the restitution within 1e-7. Rows:

    compiled, stepper   events of each ball with a change of its state, under per-sample control; without a gradient the
                        compiled solve goes on through all bounces in one call of its library
    torchdiffeq, loop   what it offers: odeint_event for each bounce of each ball; measured on some of them, times their number

    values, gradients ms    median, with least and most, without a gradient, and with its way back; ratio: over the compiled
                            field's
    error                   of the times, in seconds, and of the gradients
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from measure import Samples, elapsed, interleave, print_machine, print_table, save
from torch import Tensor

import odenet_cuda
from odenet_cuda import Event

D = torch.float64
G = 9.81
BOUNCES = 10
ALONE = 4  # balls of the loop
CLOSE = {"times": 1e-9, "gradients": 1e-7}
OPTIONS = {"method": "dopri5", "rtol": 1e-9, "atol": 1e-9}
PARTS = ("values", "gradients")


def falling(t: Tensor, y: Tensor, bounce: Tensor) -> Tensor:
    return torch.stack([y[:, 1], torch.full_like(y[:, 1], -G)], 1)


def floor(t: Tensor, y: Tensor, bounce: Tensor) -> Tensor:
    return y[:, 0]


def thrown_back(t: Tensor, y: Tensor, bounce: Tensor) -> Tensor:
    return torch.stack([torch.zeros_like(bounce), -bounce * y[:, 1]], 1)


class Balls:
    """bounce: the share of its speed that a ball keeps."""

    def __init__(self, count: int):
        self.height = torch.linspace(1.0, 2.0, count, dtype=D).requires_grad_()
        self.bounce = (0.7 + 0.25 * torch.rand(count, dtype=D)).requires_grad_()
        self.field = odenet_cuda.compile(falling)
        self.event = Event(floor, -1, apply=thrown_back)

    def closed_form(self) -> tuple[Tensor, Tensor]:
        """(the times of the bounces [BOUNCES, balls], the speed ahead of the last)."""
        first = (2 * self.height / G).sqrt()
        times, speed = [first], G * first
        for _ in range(BOUNCES - 1):
            speed = self.bounce * speed
            times.append(times[-1] + 2 * speed / G)
        return torch.stack(times), -speed

    def ours(self, func: Any, **options: Any) -> tuple[Tensor, Tensor]:
        y0 = torch.stack([self.height, torch.zeros_like(self.height)], 1)
        how: dict[str, Any] = {"step_control": "per_sample", "events": self.event, "max_events": BOUNCES, **OPTIONS, **options}
        solution = odenet_cuda.solve(func, y0, [0.0, 60.0], args=(self.bounce,), **how)
        return solution.event_t, solution.event_y[-1, :, 1]

    def one_by_one(self, rows: range) -> tuple[Tensor, Tensor]:
        """By torchdiffeq."""
        import torchdiffeq

        found = []
        for row in rows:
            bounce = self.bounce[row : row + 1]
            y, t = torch.stack([self.height[row : row + 1], torch.zeros(1, dtype=D)], 1), torch.zeros((), dtype=D)
            times = []
            for _ in range(BOUNCES):
                fall: Any = lambda t, y, bounce=bounce: falling(t, y, bounce)  # noqa: E731
                t, ys = torchdiffeq.odeint_event(fall, y, t, event_fn=lambda t, y: y[0, 0] + 1e-12, **OPTIONS)
                before, y = ys[-1], thrown_back(t, ys[-1], bounce)
                times.append(t)
            found.append((torch.stack(times), before[0, 1]))
        return torch.stack([t for t, _ in found], 1), torch.stack([speed for _, speed in found])


def loss(found: tuple[Tensor, Tensor]) -> Tensor:
    """The heights half a second after the last bounce was due, were there no floor."""
    t, speed = found
    left = 0.5 - (t[-1] - t[-1].detach())
    return (speed * left - G / 2 * left**2).sum()


def verified(balls: Balls, some: range) -> dict[str, str]:
    """The errors of each way, once all are close to the closed form."""
    exact = balls.closed_form()
    inputs = [balls.height, balls.bounce]
    expected = torch.autograd.grad(loss(exact), inputs)
    every, errors = range(len(balls.height)), {}
    ways: dict[str, tuple[Callable[[], tuple[Tensor, Tensor]], range]] = {
        "compiled": (lambda: balls.ours(balls.field), every),
        "stepper": (lambda: balls.ours(falling, compile=False), every),
        "torchdiffeq, loop": (lambda: balls.one_by_one(some), some),
    }
    for name, (way, rows) in ways.items():
        found = way()
        grads = torch.autograd.grad(loss(found), inputs)
        with torch.no_grad():
            times = way()[0]
        chosen = torch.tensor(list(rows))
        of_times = float((times - exact[0][:, chosen]).abs().max())
        of_grads = max(float((x[chosen] - y[chosen]).abs().max()) for x, y in zip(grads, expected, strict=True))
        errors[name] = f"{of_times:.1e} s, {of_grads:.1e}"
        if name != "torchdiffeq, loop" and not (of_times <= CLOSE["times"] and of_grads <= CLOSE["gradients"]):
            raise SystemExit(f"{name} is {errors[name]} away from the closed form")
    if balls.field.explain() != "compiled":
        raise SystemExit(f"the field was not compiled: {balls.field.explain()}")
    return errors


def timed(call: Callable[[], tuple[Tensor, Tensor]], inputs: list[Tensor], share: float) -> dict[str, float]:
    with torch.no_grad():
        values = elapsed(call)
    return {"values": values * share, "gradients": elapsed(lambda: torch.autograd.grad(loss(call()), inputs)) * share}


def bench(count: int, runs: int) -> list[dict[str, Any]]:
    balls = Balls(count)
    some = range(0, count, max(1, count // ALONE))
    errors = verified(balls, some)
    ways: dict[str, Callable[[], Any]] = {
        "compiled": lambda: balls.ours(balls.field),
        "stepper": lambda: balls.ours(falling, compile=False),
        "torchdiffeq, loop": lambda: balls.one_by_one(some),
    }
    share = {"torchdiffeq, loop": count / len(some)}
    inputs = [balls.height, balls.bounce]
    each = {name: (lambda name=name: timed(ways[name], inputs, share.get(name, 1.0))) for name in ways}
    samples: dict[str, Samples] = interleave(each, runs, warmup=1)
    first = samples["compiled"]
    return [
        {"way": name, **{k: v for part in PARTS for k, v in x.beside(first, part).items()}, "error": errors[name]}
        for name, x in samples.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="also write the results there")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--balls", type=int, nargs="+", default=[1, 1000])
    parser.add_argument("--quick", action="store_true", help="a few balls, once")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print_machine()
    results = {}
    for count in [5] if arguments.quick else arguments.balls:
        results[f"{count} balls"] = rows = bench(count, 1 if arguments.quick else arguments.runs)
        print_table(f"{count} balls with {BOUNCES} bounces each", rows)
        some = len(range(0, count, max(1, count // ALONE)))
        print(f"the loop: {some} of {count} balls measured, times {count / some:g}")
    save(arguments.json, results)


if __name__ == "__main__":
    main()

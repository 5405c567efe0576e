"""Model predictive control: a motor too weak to lift a pendulum swings it up, holds it, and catches it after pushes.

    python examples/mpc_pendulum.py [--short] [--compare] [--out demo_results]

Twenty times a second the next second is predicted for eight plans of the torque at once, each constant over a twentieth, and
gradients through the solve make them better: ten steps of Adam from the best plan of before, moved on, and seven like it. The
first torque of the best is applied to a pendulum whose friction the model does not know. The plans are `args` of a compiled
field, so nothing is read anew from one solve to the next.
"""

import math
import statistics
import time
from collections.abc import Callable

import torch
from gallery import beside, options, plt, progress, save
from torch import Tensor

import odenet_cuda
from odenet_cuda import solve

PERIOD, AHEAD, PLANS, STEPS, RATE = 0.05, 20, 8, 10, 0.3
SECONDS, PUSHES = 12.0, {6.0: 1.5, 9.0: -2.5}  # by time, of the speed
GRAVITY, LIMIT, FRICTION = 9.81, 3.0, 0.2  # of unit mass and length: 1/s^2, the torque's, and the plant's
TOLERANCES = {"rtol": 1e-5, "atol": 1e-5}
TIMES = PERIOD * torch.arange(AHEAD + 1, dtype=torch.float64)


def model(t: Tensor, y: Tensor, plans: Tensor) -> Tensor:
    """y: [plans, 2], the angle, 0 where it stands, and the speed. plans: [plans, AHEAD], squashed to the limit."""
    place = (torch.searchsorted(TIMES, torch.ones_like(y[:, :1]) * t, right=True) - 1).clamp(0, AHEAD - 1)
    return pendulum(y, LIMIT * torch.tanh(plans.gather(1, place)), 0.0)


def pendulum(y: Tensor, torque: Tensor, friction: float) -> Tensor:
    angle, v = y[:, :1], y[:, 1:]
    return torch.cat([v, GRAVITY * torch.sin(angle) - friction * v + torque], 1)


def plant(t: Tensor, y: Tensor, torque: Tensor) -> Tensor:
    return pendulum(y, torque, FRICTION)


def cost(ys: Tensor, plans: Tensor) -> Tensor:
    """[plans]: what of the energy is missing to stand, the height, and a little of the speed, the torque and its changes."""
    height, square = torch.cos(ys[..., 0]) - 1, ys[..., 1].square()
    off = (square / (2 * GRAVITY) + height).square() - height + 0.02 * square
    part = torch.tanh(plans)
    torque = 0.02 * part.square().sum(1) + 0.1 * part.diff(dim=1).square().sum(1)
    return PERIOD * (off.sum(0) + torque) + off[-1]


class Controller:
    """predict(y0, plans): the states at TIMES, [T, plans, 2], with gradients to the plans."""

    def __init__(self, predict: Callable[[Tensor, Tensor], Tensor]):
        self.predict, self.plans = predict, torch.zeros(PLANS, AHEAD, dtype=torch.float64, requires_grad=True)

    def improve(self, y: Tensor) -> Tensor:
        """Better plans from the state y, [2], the best one first; gives its states, [T, 2]."""
        optimiser, y0 = torch.optim.Adam([self.plans]), y.expand(PLANS, 2)
        for i in range(STEPS):
            optimiser.param_groups[0]["lr"] = RATE * (1 - i / STEPS)
            costs = cost(self.predict(y0, self.plans), self.plans)
            (self.plans.grad,) = torch.autograd.grad(costs.sum(), self.plans)
            optimiser.step()
        with torch.no_grad():
            ys = self.predict(y0, self.plans)
            best = int(cost(ys, self.plans).argmin())
            self.plans.copy_(torch.roll(self.plans, -best, 0))
        return ys[:, best]

    @torch.no_grad()
    def move_on(self) -> None:
        """A period has gone: the best plan, and others that are like it."""
        best = torch.cat([self.plans[:1, 1:], self.plans[:1, -1:]], 1).clamp(-2, 2)
        self.plans.copy_(best + 0.3 * torch.randn(PLANS, AHEAD) * (torch.arange(PLANS) > 0)[:, None])


FIELD = odenet_cuda.compile(model)
HOW = {"step_control": "per_sample", "gradient": "checkpoint", "jump_t": TIMES[1:-1], **TOLERANCES}


def predict(y0: Tensor, plans: Tensor) -> Tensor:
    return solve(FIELD, y0, TIMES, args=(plans,), **HOW).ys


def main() -> None:
    arguments = options(__doc__)
    controller, real = Controller(predict), odenet_cuda.compile(plant)
    y = torch.tensor([math.pi, 0.0], dtype=torch.float64)  # it hangs
    controller.move_on()
    controller.improve(y)  # reads and compiles
    seconds, states, torques, ahead = [], [], [], []
    bar = progress(range(5 if arguments.short else round(SECONDS / PERIOD)), "control")
    for i in bar:
        y = y + torch.tensor([0.0, PUSHES.get(round(i * PERIOD, 6), 0.0)])
        begin = time.perf_counter()
        predicted = controller.improve(y)
        torque = LIMIT * torch.tanh(controller.plans.detach()[:1, :1])
        seconds.append(time.perf_counter() - begin)
        states.append(y)
        torques.append(torque.item())
        ahead.append(predicted)
        with torch.no_grad():
            y = solve(real, y[None], [0.0, PERIOD], args=(torque,), **TOLERANCES).ys[-1, 0]
        controller.move_on()
        bar.set_postfix_str(f"angle {math.remainder(y[0].item(), 2 * math.pi):.2f}", refresh=False)
    ms = sorted(1e3 * x for x in seconds)
    print(f"served by: {FIELD.explain()}")
    print(f"a control step: median {statistics.median(ms):.3g} ms, 99 % {ms[int(0.99 * len(ms))]:.3g} ms of {1e3 * PERIOD:.0f}")
    draw(torch.stack(states), torques, ahead, arguments.out / "mpc_pendulum.png")
    if arguments.compare:
        compare(controller.plans.detach().clone())


def compare(plans: Tensor) -> None:
    """A control step from the same plans, hanging. torchdiffeq has one step size for all plans."""

    def control(how: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        controller = Controller(how)
        with torch.no_grad():
            controller.plans.copy_(plans)
        return controller.improve(torch.tensor([math.pi, 0.0], dtype=torch.float64))

    def theirs(torchdiffeq) -> Tensor:
        def predicted(y0: Tensor, plans: Tensor) -> Tensor:
            stops = {"jump_t": TIMES[1:-1]}
            return torchdiffeq.odeint(lambda t, y: model(t, y, plans), y0, TIMES, options=stops, **TOLERANCES)

        return control(predicted)

    beside(f"a control step, {STEPS} gradients", lambda: control(predict), theirs, 1e-2)


def draw(states: Tensor, torques: list[float], ahead: list[Tensor], path) -> None:
    figure, (axis, middle, plane) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained", width_ratios=[1.6, 1.6, 1])
    angle = torch.remainder(states[:, 0] + math.pi, 2 * math.pi) - math.pi
    t = PERIOD * torch.arange(len(states))
    axis.axhline(0, color="black", linewidth=0.6)
    axis.plot(t, torch.where(angle.diff(append=angle[-1:]).abs() > math.pi, torch.nan, angle), color="tab:blue")
    for push in PUSHES:
        axis.axvline(push, color="tab:red", linewidth=0.8, linestyle="--")
    axis.set(xlabel="seconds", ylabel="angle", title="the angle, 0 where it stands; pushes dashed")
    middle.step(t, torques, where="post", color="tab:green", linewidth=1)
    middle.set(xlabel="seconds", ylabel="torque", title=f"the torque; {GRAVITY} would lift it")
    for predicted in ahead[::4]:
        plane.plot(*predicted.detach().T, color="tab:gray", linewidth=0.5)
    plane.plot(*states.T, color="tab:blue", linewidth=1)
    plane.set(xlabel="angle", ylabel="speed", title="the way, and plans (gray)")
    save(figure, path)


if __name__ == "__main__":
    main()

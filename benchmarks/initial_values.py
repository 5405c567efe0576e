"""Initial value problems with known end values: DETEST, classes A to E, and a stiff set. Benchmarks and tests share them.

DETEST: Hull, Enright, Fellen and Sedgwick 1972, doi 10.1137/0709052; each from t = 0 to 20. The stiff set: the test set for
initial value problem solvers of Bari, and Hairer and Wanner, Solving Ordinary Differential Equations II, IV.10. End values are
closed forms, or numbers of 113 or 160 bits, solved at two meshes; those of C5, E2, E3, PLEI, POLLU and E5 are made by
`end_values.cpp`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

NUMPY = SimpleNamespace(
    stack=np.array, parts=tuple, join=np.concatenate, array=np.asarray,
    sin=np.sin, cos=np.cos, sqrt=np.sqrt, eye=np.eye,
)  # fmt: skip
TORCH = SimpleNamespace(
    stack=lambda parts: torch.stack(parts, -1),
    parts=lambda y: y.unbind(-1),
    join=lambda parts: torch.cat(parts, -1),
    array=lambda x: torch.tensor(x, dtype=torch.float64, device="cpu"),
    sin=torch.sin, cos=torch.cos, sqrt=torch.sqrt,
    eye=lambda n: torch.eye(n, dtype=torch.float64, device="cpu"),
)  # fmt: skip


@dataclass(frozen=True)
class InitialValues:
    """func(t, y, xp) with y [n]; xp: NUMPY or TORCH. y0 at t = 0. ends: y(end). atol: over rtol, of the stiff set: about the
    size that the smallest component reaches. counted: the components whose ends are not below all tolerances."""

    func: Callable[[Any, Any, Any], Any]
    y0: Sequence[float]
    end: float
    ends: Sequence[float]
    atol: float = 1.0
    counted: Sequence[int] = ()

    def numpy(self, t: float, y: np.ndarray) -> np.ndarray:
        found: np.ndarray = self.func(t, y, NUMPY)
        return found

    def torch(self, t: Tensor, y: Tensor) -> Tensor:
        found: Tensor = self.func(t, y, TORCH)
        return found

    def digits(self, y: np.ndarray) -> float:
        """-log10 of the largest relative error of a component."""
        which = list(self.counted) or slice(None)
        expected = np.array(self.ends)[which]
        return -math.log10(max(np.max(np.abs(np.asarray(y)[which] - expected) / np.abs(expected)), 1e-17))

    def error(self, y: np.ndarray) -> float:
        """The largest, in units of 1 + |y|: what rtol = atol bounds in a step."""
        expected = np.array(self.ends)
        return float(np.max(np.abs(np.asarray(y) - expected) / (1 + np.abs(expected))))


# ---- DETEST ----


def _chain(rates: Callable[[int], tuple[float, float]], n: int) -> Callable[..., Any]:
    """y_i' = in_i y_(i-1) - out_i y_i."""
    matrix = np.zeros((n, n))
    for i in range(n):
        gain, loss = rates(i + 1)
        matrix[i, i] = -loss
        if i:
            matrix[i, i - 1] = gain
    return lambda t, y, xp: xp.array(matrix) @ y


def _diffusion(n: int) -> Callable[..., Any]:
    matrix = np.diag([-2.0] * n) + np.diag([1.0] * (n - 1), 1) + np.diag([1.0] * (n - 1), -1)
    return lambda t, y, xp: xp.array(matrix) @ y


def _diffused(n: int, t: float) -> list[float]:
    """From (1, 0, ...), by the eigenvectors."""
    angle = np.pi * np.arange(1, n + 1) / (n + 1)
    weights = 2 / (n + 1) * np.sin(angle) * np.exp(-4 * np.sin(angle / 2) ** 2 * t)
    return [float(weights @ np.sin(i * angle)) for i in range(1, n + 1)]


def _bodies(mass: Sequence[float], dims: int, strength: float, centre: float) -> Callable[..., Any]:
    """Bodies that attract each other, beside a fixed one of mass `centre` in whose frame they are, if that is not 0."""
    count = len(mass)

    def func(t: Any, y: Any, xp: Any) -> Any:
        half, m = count * dims, xp.array(np.array(mass))
        place = y[:half].reshape(count, dims)
        apart = place[None] - place[:, None]
        cube = ((apart**2).sum(-1) + xp.eye(count)) ** 1.5
        pull = (m[None, :, None] * apart / cube[:, :, None]).sum(1)
        if centre:
            own = place / ((place**2).sum(-1) ** 1.5)[:, None]
            drawn = m[:, None] * own
            pull = pull - (centre + m)[:, None] * own - (drawn.sum(0)[None] - drawn)
        return xp.join([y[half:], (strength * pull).reshape(-1)])

    return func


PLANETS = (0.000954786104043, 0.000285583733151, 0.0000437273164546, 0.0000517759138449, 0.00000277777777778)
_PLANETS_AT_0 = [
    3.42947415189, 3.35386959711, 1.35494901715, 6.64145542550, 5.97156957878, 2.18231499728, 11.2630437207, 14.6952576794,
    6.27960525067, -30.1552268759, 1.65699966404, 1.43785752721, -21.1238353380, 28.4465098142, 15.3882659679, -0.557160570446,
    0.505696783289, 0.230578543901, -0.415570776342, 0.365682722812, 0.169143213293, -0.325325669158, 0.189706021964,
    0.0877265322780, -0.0240476254170, -0.287659532608, -0.117219543175, -0.176860753121, -0.216393453025, -0.0148647893090,
]  # fmt: skip


def _kepler(t: Any, y: Any, xp: Any) -> Any:
    a, b, c, d = xp.parts(y)
    cube = (a * a + b * b) ** 1.5
    return xp.stack([c, d, -a / cube, -b / cube])


def _orbit(e: float, t: float) -> list[float]:
    anomaly = t
    for _ in range(60):
        anomaly -= (anomaly - e * math.sin(anomaly) - t) / (1 - e * math.cos(anomaly))
    s, c, root = math.sin(anomaly), math.cos(anomaly), math.sqrt(1 - e * e)
    return [c - e, root * s, -s / (1 - e * c), root * c / (1 - e * c)]


def _b1(t: Any, y: Any, xp: Any) -> Any:
    a, b = xp.parts(y)
    return xp.stack([2 * (a - a * b), a * b - b])


def _b2(t: Any, y: Any, xp: Any) -> Any:
    a, b, c = xp.parts(y)
    return xp.stack([b - a, a - 2 * b + c, b - c])


def _b3(t: Any, y: Any, xp: Any) -> Any:
    a, b, _ = xp.parts(y)
    return xp.stack([-a, a - b * b, b * b])


def _b4(t: Any, y: Any, xp: Any) -> Any:
    a, b, c = xp.parts(y)
    radius = (a * a + b * b) ** 0.5
    return xp.stack([-b - a * c / radius, a - b * c / radius, a / radius])


def _b5(t: Any, y: Any, xp: Any) -> Any:
    a, b, c = xp.parts(y)
    return xp.stack([b * c, -a * c, -0.51 * a * b])


def _e1(t: Any, y: Any, xp: Any) -> Any:
    a, b = xp.parts(y)
    return xp.stack([b, -(b / (t + 1) + (1 - 0.25 / (t + 1) ** 2) * a)])


def _e2(t: Any, y: Any, xp: Any) -> Any:
    a, b = xp.parts(y)
    return xp.stack([b, (1 - a * a) * b - a])


def _e3(t: Any, y: Any, xp: Any) -> Any:
    a, b = xp.parts(y)
    return xp.stack([b, a**3 / 6 - a + 2 * xp.sin(2.78535 * t)])


def _e4(t: Any, y: Any, xp: Any) -> Any:
    _, b = xp.parts(y)
    return xp.stack([b, 0.032 - 0.4 * b * b])


def _e5(t: Any, y: Any, xp: Any) -> Any:
    _, b = xp.parts(y)
    return xp.stack([b, (1 + b * b) ** 0.5 / (25 - t)])


def _half_bessel(x: float) -> list[float]:
    """J of order 1/2 and its derivative."""
    root = math.sqrt(2 / (math.pi * x))
    return [root * math.sin(x), root * (math.cos(x) - math.sin(x) / (2 * x))]


def _falling(t: float) -> list[float]:
    """E4: y2' = 0.032 - 0.4 y2^2 from 0."""
    s = math.sqrt(0.08)
    return [30 + math.log(math.cosh(0.4 * s * t)) / 0.4, s * math.tanh(0.4 * s * t)]


_C5_END = [
    -4.79273022432363490e0, -2.42055072544902206e0, -9.21250930601511867e-1, -4.21731040403521339e0, 7.35620294749896997e0,
    3.22378598542121177e0, 4.03555944326227056e0, 1.71986552867055496e1, 7.47891079423370276e0, -2.99875932632484422e1,
    -4.10731093755092956e0, -9.27700832175440829e-1, -2.44212530251848277e1, 2.38145904574655444e1, 1.49209630695135880e1,
    3.49920896306399729e-1, -5.74848768791280274e-1, -2.55169402087914437e-1, -5.23704097890332545e-1, -2.49300046357966172e-1,
    -8.04534164204446570e-2, -3.87528923733410953e-1, 5.64860328876789208e-2, 3.02360647214334300e-2, 4.13385654671244617e-2,
    -2.86239302984137930e-1, -1.18303240513620701e-1, -1.51198645735920560e-1, -2.46006889431876562e-1, -3.18968741132387708e-2,
]  # fmt: skip
_E2_END = [
    2.00814976217494859e0, -4.25088752732021469e-2,
]  # fmt: skip
_E3_END = [
    -1.00417885864724071e-1, 2.41140013209595558e-1,
]  # fmt: skip
DETEST: dict[str, InitialValues] = {
    "A1": InitialValues(lambda t, y, xp: -y, [1], 20, [math.exp(-20)]),
    "A2": InitialValues(lambda t, y, xp: -(y**3) / 2, [1], 20, [21**-0.5]),
    "A3": InitialValues(lambda t, y, xp: y * xp.cos(t), [1], 20, [math.exp(math.sin(20))]),
    "A4": InitialValues(lambda t, y, xp: y / 4 * (1 - y / 20), [1], 20, [20 / (1 + 19 * math.exp(-5))]),
    "A5": InitialValues(lambda t, y, xp: (y - t) / (y + t), [4], 20, [-7.887826688964014237e-1]),
    "B1": InitialValues(_b1, [1, 3], 20, [6.761876008576606607e-1, 1.860816099640029801e-1]),
    "B2": InitialValues(_b2, [2, 0, 1], 20, [1.000000001030576811e0, 1.0, 9.999999989694231888e-1]),
    "B3": InitialValues(_b3, [1, 0, 0], 20, [2.061153622438557828e-9, 5.257228022048512529e-2, 9.474277177183612523e-1]),
    "B4": InitialValues(_b4, [3, 0, 0], 20, [9.826950928006530499e-1, 2.198447081694929702e0, 9.129452507276276544e-1]),
    "B5": InitialValues(_b5, [0, 1, 1], 20, [-9.396570798729203962e-1, -3.421177754000749065e-1, 7.414126596199953008e-1]),
    "C1": InitialValues(
        _chain(lambda i: (1.0, float(i < 10)), 10), [1] + [0] * 9, 20,
        [2.061153622438557828e-9, 4.122307244877115656e-8, 4.122307244877115656e-7, 2.748204829918077104e-6,
         1.374102414959038552e-5, 5.496409659836154208e-5, 1.832136553278718069e-4, 5.234675866510623055e-4,
         1.308668966627655764e-3, 9.979127409508649812e-1],
    ),
    "C2": InitialValues(
        _chain(lambda i: (i - 1.0, i * float(i < 10)), 10), [1] + [0] * 9, 20,
        [2.061153622438557828e-9, 2.061153618190203573e-9, 2.061153613941849326e-9, 2.061153609693495088e-9,
         2.061153605445140859e-9, 2.061153601196786639e-9, 2.061153596948432428e-9, 2.061153592700078225e-9,
         2.061153588451724031e-9, 9.999999814496175510e-1],
    ),
    "C3": InitialValues(_diffusion(10), [1] + [0] * 9, 20, _diffused(10, 20)),
    "C4": InitialValues(_diffusion(51), [1] + [0] * 50, 20, _diffused(51, 20)),
    "C5": InitialValues(_bodies(PLANETS, 3, 2.95912208286, 1.00000597682), _PLANETS_AT_0, 20, _C5_END),
    **{
        f"D{i}": InitialValues(_kepler, [1 - e, 0, 0, math.sqrt((1 + e) / (1 - e))], 20, _orbit(e, 20))
        for i, e in enumerate((0.1, 0.3, 0.5, 0.7, 0.9), 1)
    },
    "E1": InitialValues(_e1, _half_bessel(1.0), 20, _half_bessel(21.0)),
    "E2": InitialValues(_e2, [2, 0], 20, _E2_END),
    "E3": InitialValues(_e3, [0, 0], 20, _E3_END),
    "E4": InitialValues(_e4, [30, 0], 20, _falling(20)),
    "E5": InitialValues(_e5, [0, 0], 20, [(25 * math.log(5) - 12) / 2, 2.4]),
}  # fmt: skip


# ---- the stiff set ----


def rober(t: Any, y: Any, xp: Any) -> Any:
    a, b, c = xp.parts(y)
    return xp.stack([-0.04 * a + 1e4 * b * c, 0.04 * a - 1e4 * b * c - 3e7 * b * b, 3e7 * b * b])


def orego(t: Any, y: Any, xp: Any) -> Any:
    a, b, c = xp.parts(y)
    return xp.stack([77.27 * (b + a * (1 - 8.375e-6 * a - b)), (c - (1 + a) * b) / 77.27, 0.161 * (a - c)])


def vdpol(t: Any, y: Any, xp: Any) -> Any:
    a, b = xp.parts(y)
    return xp.stack([b, ((1 - a * a) * b - a) / 1e-6])


def hires(t: Any, y: Any, xp: Any) -> Any:
    a, b, c, d, e, f, g, h = xp.parts(y)
    last = 280 * f * h - 1.81 * g
    return xp.stack(
        [
            -1.71 * a + 0.43 * b + 8.32 * c + 0.0007,
            1.71 * a - 8.75 * b,
            -10.03 * c + 0.43 * d + 0.035 * e,
            8.32 * b + 1.71 * c - 1.12 * d,
            -1.745 * e + 0.43 * (f + g),
            -280 * f * h + 0.69 * d + 1.71 * e - 0.43 * f + 0.69 * g,
            last,
            -last,
        ]
    )


def stiff_e5(t: Any, y: Any, xp: Any) -> Any:
    """Enright, Hull and Lindberg 1975. y2 = y3 + y4 is kept to rounding, which the end depends on."""
    a, b, c, d = xp.parts(y)
    slow, first, second, back = 7.89e-10 * a, 1.1e7 * a * c, 1.13e9 * b * c, 1.13e3 * d
    second, back = slow - second, first - back
    return xp.stack([-slow - first, second, second - back, back])


# rate; the species that react; those that are made, all of them numbered from 1
_POLLU = (
    (0.35, (1,), (2, 3)),
    (26.6, (2, 4), (1,)),
    (1.23e4, (5, 2), (6, 1)),
    (8.6e-4, (7,), (5, 5, 8)),
    (8.2e-4, (7,), (8,)),
    (1.5e4, (7, 6), (5, 8)),
    (1.3e-4, (9,), (10, 5, 8)),
    (2.4e4, (9, 6), (11,)),
    (1.65e4, (11, 2), (10, 12, 1)),
    (9e3, (11, 1), (13,)),
    (0.022, (13,), (11, 1)),
    (1.2e4, (10, 2), (14, 1)),
    (1.88, (14,), (7, 5)),
    (1.63e4, (1, 6), (15,)),
    (4.8e6, (3,), (4,)),
    (3.5e-4, (4,), (16,)),
    (0.0175, (4,), (3,)),
    (1e8, (16,), (6, 6)),
    (4.44e11, (16,), (3,)),
    (1.24e3, (17, 6), (18, 5)),
    (2.1, (19,), (2,)),
    (5.78, (19,), (1, 3)),
    (0.0474, (1, 4), (19,)),
    (1.78e3, (19, 1), (20,)),
    (3.12, (20,), (1, 19)),
)


def _pollu_matrices() -> tuple[np.ndarray, np.ndarray, list[int], list[int]]:
    """(rates; what each reaction changes, [species, reactions]; the two species of each, 20 standing for the number 1)."""
    changes = np.zeros((20, len(_POLLU)))
    for j, (_, used, made) in enumerate(_POLLU):
        for i in used:
            changes[i - 1, j] -= 1
        for i in made:
            changes[i - 1, j] += 1
    first, second = [[[*used, 21, 21][k] - 1 for _, used, _ in _POLLU] for k in (0, 1)]
    return np.array([rate for rate, _, _ in _POLLU]), changes, first, second


_RATES, _CHANGES, _FIRST, _SECOND = _pollu_matrices()


def pollu(t: Any, y: Any, xp: Any) -> Any:
    """Verwer 1994: 20 species in 25 reactions."""
    species = xp.join([y, xp.array(np.ones(1))])
    return xp.array(_CHANGES) @ (xp.array(_RATES) * species[_FIRST] * species[_SECOND])


_PLEI_END = [
    3.70613914397051290e-1, -3.94343758551739205e0, 3.23728409205723309e0, -3.27138097397254992e0, -3.22255903241832334e0,
    5.22508184345654419e0, 6.59709145577530835e-1, -2.59061243497746951e0, 3.42558170715657979e-1, 1.19821369339227463e0,
    1.56217210140063101e0, -2.42968234493582340e-1, -7.00309292221249538e-1, 1.09144924042897974e0, 3.41700380631431475e0,
    -3.74124496123400847e0, 1.35458450162550122e0, 3.77345968575062903e-1, -2.59006559781077541e0, 9.38685886955107888e-1,
    2.02505373471424110e0, 3.66792222720056986e-1, -1.15581510016044909e0, -3.47404635380849436e-1, -8.07298817022302172e-1,
    2.34491544818093692e0, 5.95239635420871876e-1, -1.94702043426329190e0,
]  # fmt: skip
_POLLU_END = [
    5.64625548002276927e-2, 1.34248413042233852e-1, 4.13973433109942697e-9, 5.52314020748435993e-3, 2.01897726230219604e-7,
    1.46454186349396579e-7, 7.78424911899796414e-2, 3.24507535339601821e-1, 7.49401338388040555e-3, 1.62229315730156035e-8,
    1.13586383325707482e-8, 2.23050597572135986e-3, 2.08716288279863004e-4, 1.39692101684015771e-5, 8.96488485689829417e-3,
    4.35284636933010367e-18, 6.89921969626340540e-3, 1.00780303736594595e-4, 1.77214651396998453e-6, 5.68294329231639344e-5,
]  # fmt: skip
_E5_END = [0.0, 1.0192582568142750e-20, 1.0192582568142661e-20, 0.0]  # the other two below 1e-48
STIFF: dict[str, InitialValues] = {
    "ROBER": InitialValues(
        rober, [1, 0, 0], 1e11, [2.08334014970129423e-8, 8.33336077033478340e-14, 9.99999979166515169e-1], 1e-8
    ),
    "OREGO": InitialValues(orego, [1, 2, 3], 360, [1.00081487031852272, 1.22817852154988799e3, 1.32055494284650828e2], 1e-2),
    "VDPOL": InitialValues(vdpol, [2, 0], 2, [1.70616773217046501, -8.92809701024816548e-1], 1e-2),
    "HIRES": InitialValues(
        hires, [1, 0, 0, 0, 0, 0, 0, 0.0057], 321.8122,
        [7.3713125733256678e-4, 1.4424857263161847e-4, 5.8887297409675750e-5, 1.1756513432831491e-3, 2.3863561988313305e-3,
         6.2389682527427958e-3, 2.8499983951857687e-3, 2.8500016048142313e-3],
        1e-4,
    ),
    "POLLU": InitialValues(pollu, [0, 0.2, 0, 0.04, 0, 0, 0.1, 0.3, 0.01] + [0] * 7 + [0.007, 0, 0, 0], 60, _POLLU_END, 1e-9),
    "PLEI": InitialValues(
        _bodies((1, 2, 3, 4, 5, 6, 7), 2, 1.0, 0.0),
        [3, 3, 3, -3, -1, 2, -3, 0, 2, 0, -2, -4, 2, 4, 0, 0, 0, 0, 0, 0, 0, -1.25, 0, 1, 1.75, 0, -1.5, 0], 3, _PLEI_END, 1.0,
    ),
    "E5": InitialValues(stiff_e5, [1.76e-3, 0, 0, 0], 1e11, _E5_END, 1e-20, (1, 2)),
}  # fmt: skip


# ROBER at t = 40, and the derivatives of its numbers by the logarithms of the rates 0.04, 1e4 and 3e7, [rate][number].
ROBER_AT_40 = [7.1582706871940509047e-1, 9.1855347645577638993e-6, 2.8416374574583035176e-1]
ROBER_BY_RATES = [
    [-1.6990235086822930571e-1, 1.8364784997015575731e-6, 1.6990051438972960415e-1],
    [1.3730807973446247425e-1, -2.3571921138463330740e-6, -1.3730572254234862792e-1],
    [-6.8650652667170079573e-2, -3.4141785280503819551e-6, 6.8654066845698129955e-2],
]


def rober_by_rates(solved: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    """(y at t = 40; the logarithms of the rates over their own, which are 0, with a gradient). solved: of (func, y0, t)."""
    log_k = torch.zeros(3, dtype=torch.float64, device="cpu", requires_grad=True)
    rates = torch.tensor([0.04, 1e4, 3e7], dtype=torch.float64, device="cpu")

    def func(t: Tensor, y: Tensor) -> Tensor:
        (a, b, c), k = y.unbind(-1), rates * log_k.exp()
        one, two, three = k[0] * a, k[1] * b * c, k[2] * b * b
        return torch.stack([two - one, one - two - three, three], -1)

    return solved(func, torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64, device="cpu"), [0.0, 40.0]), log_k

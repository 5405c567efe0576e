"""The methods: one instance each, with its source. Names and choices are torchdiffeq's where it has the method.

An adaptive method begins a step with the last slope of the one before. Of most that is the slope at (t1, y1), "first same as
last"; where the published method lacks it, it is a last stage here. Of the two methods of order 2 it lies O(dt^2) beside, which
keeps their order (as a predictor and corrector without a last evaluation: Hairer, Norsett and Wanner I, III.1) and saves an
evaluation.
"""

from .tableau import ButcherTableau, hermite, quadratic, quartic

_DOPRI5_B = (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0.0)
_DOPRI5_EMBEDDED = (1951 / 21600, 0.0, 22642 / 50085, 451 / 720, -12231 / 42400, 649 / 6300, 1 / 60)

DOPRI5 = ButcherTableau(
    # Dormand and Prince 1980, doi 10.1016/0771-050X(80)90013-3; embedded weights and midpoint of Shampine 1986,
    # doi 10.1090/S0025-5718-1986-0815836-3
    order=5,
    c=(0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0),
    a=(
        (),
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        _DOPRI5_B[:-1],
    ),
    b=_DOPRI5_B,
    e=tuple(b - embedded for b, embedded in zip(_DOPRI5_B, _DOPRI5_EMBEDDED, strict=True)),
    p=quartic(
        _DOPRI5_B,
        (
            6025192743 / 30085553152 / 2,
            0.0,
            51252292925 / 65400821598 / 2,
            -2691868925 / 45128329728 / 2,
            187940372067 / 1594534317056 / 2,
            -1776094331 / 19743644256 / 2,
            11237099 / 235043384 / 2,
        ),
    ),
    p_order=4,
)

_TSIT5_B = (
    0.09646076681806523,
    0.01,
    0.4798896504144996,
    1.379008574103742,
    -3.290069515436081,
    2.324710524099774,
    0.0,
)

TSIT5 = ButcherTableau(  # Tsitouras 2011, doi 10.1016/j.camwa.2011.06.002; the interpolant is the paper's, multiplied out
    order=5,
    c=(0.0, 0.161, 0.327, 0.9, 0.9800255409045097, 1.0, 1.0),
    a=(
        (),
        (0.161,),
        (-0.008480655492356989, 0.335480655492357),
        (2.8971530571054935, -6.359448489975075, 4.3622954328695815),
        (5.325864828439257, -11.748883564062828, 7.4955393428898365, -0.09249506636175525),
        (5.86145544294642, -12.92096931784711, 8.159367898576159, -0.071584973281401, -0.028269050394068383),
        _TSIT5_B[:-1],
    ),
    b=_TSIT5_B,
    e=(
        -0.00178001105222577714,
        -0.0008164344596567469,
        0.007880878010261995,
        -0.1447110071732629,
        0.5823571654525552,
        -0.45808210592918697,
        1 / 66,
    ),
    p=tuple(
        tuple(scale * x for x in (linear, constant, first, 1.0))
        for scale, linear, constant, first in (
            # scale * theta * (linear + constant theta + first theta^2 + theta^3)
            (
                -1.0530884977290216,
                -1.3299890189751412 * 0.7139816917074209,
                0.7139816917074209 + 1.3299890189751412 * 1.4364028541716351,
                -1.4364028541716351 - 1.3299890189751412,
            ),
            (0.1017, 0.0, 1.2949852507374631, -2.1966568338249754),
            (2.490627285651252793, 0.0, 1.57803468208092486, -2.38535645472061657),
            (
                -16.54810288924490272,
                0.0,
                1.21712927295533244 * 0.61620406037800089,
                -1.21712927295533244 - 0.61620406037800089,
            ),
            (
                47.37952196281928122,
                0.0,
                1.203071208372362603 * 0.658047292653547382,
                -1.203071208372362603 - 0.658047292653547382,
            ),
            (-34.87065786149660974, 0.0, 1.2 * 2 / 3, -1.2 - 2 / 3),
            (2.5, 0.0, 0.6, -1.6),
        )
    ),
    p_order=4,
)

_DOPRI8_B = (
    14005451 / 335480064,
    0.0,
    0.0,
    0.0,
    0.0,
    -59238493 / 1068277825,
    181606767 / 758867731,
    561292985 / 797845732,
    -1041891430 / 1371343529,
    760417239 / 1151165299,
    118820643 / 751138087,
    -528747749 / 2220607170,
    1 / 4,
    0.0,
)
_DOPRI8_EMBEDDED = (
    13451932 / 455176623,
    0.0,
    0.0,
    0.0,
    0.0,
    -808719846 / 976000145,
    1757004468 / 5645159321,
    656045339 / 265891186,
    -3867574721 / 1518517206,
    465885868 / 322736535,
    53011238 / 667516719,
    2 / 45,
    0.0,
    0.0,
)

# fmt: off
DOPRI8 = ButcherTableau(
    # RK8(7)13M of Prince and Dormand 1981, doi 10.1016/0771-050X(81)90010-3, with f(t1, y1) as a fourteenth stage for its
    # continuous extension of degree 6 and order 5, whose midpoint torchdiffeq uses
    order=8,
    c=(
        0.0, 1 / 18, 1 / 12, 1 / 8, 5 / 16, 3 / 8, 59 / 400, 93 / 200, 5490023248 / 9719169821, 13 / 20,
        1201146811 / 1299019798, 1.0, 1.0, 1.0,
    ),
    a=(
        (),
        (1 / 18,),
        (1 / 48, 1 / 16),
        (1 / 32, 0.0, 3 / 32),
        (5 / 16, 0.0, -75 / 64, 75 / 64),
        (3 / 80, 0.0, 0.0, 3 / 16, 3 / 20),
        (
            29443841 / 614563906, 0.0, 0.0, 77736538 / 692538347, -28693883 / 1125000000, 23124283 / 1800000000,
        ),
        (
            16016141 / 946692911, 0.0, 0.0, 61564180 / 158732637, 22789713 / 633445777, 545815736 / 2771057229,
            -180193667 / 1043307555,
        ),
        (
            39632708 / 573591083, 0.0, 0.0, -433636366 / 683701615, -421739975 / 2616292301, 100302831 / 723423059,
            790204164 / 839813087, 800635310 / 3783071287,
        ),
        (
            246121993 / 1340847787, 0.0, 0.0, -37695042795 / 15268766246, -309121744 / 1061227803,
            -12992083 / 490766935, 6005943493 / 2108947869, 393006217 / 1396673457, 123872331 / 1001029789,
        ),
        (
            -1028468189 / 846180014, 0.0, 0.0, 8478235783 / 508512852, 1311729495 / 1432422823,
            -10304129995 / 1701304382, -48777925059 / 3047939560, 15336726248 / 1032824649,
            -45442868181 / 3398467696, 3065993473 / 597172653,
        ),
        (
            185892177 / 718116043, 0.0, 0.0, -3185094517 / 667107341, -477755414 / 1098053517,
            -703635378 / 230739211, 5731566787 / 1027545527, 5232866602 / 850066563, -4093664535 / 808688257,
            3962137247 / 1805957418, 65686358 / 487910083,
        ),
        (
            403863854 / 491063109, 0.0, 0.0, -5068492393 / 434740067, -411421997 / 543043805,
            652783627 / 914296604, 11173962825 / 925320556, -13158990841 / 6184727034, 3936647629 / 1978049680,
            -160528059 / 685178525, 248638103 / 1413531060, 0.0,
        ),
        _DOPRI8_B[:-1],
    ),
    b=_DOPRI8_B,
    e=tuple(b - embedded for b, embedded in zip(_DOPRI8_B, _DOPRI8_EMBEDDED, strict=True)),
    p=(
        (
            1.0, -6.6910181737837595697, 19.9990069333683970610,
            -30.0610568289666450593, 22.1396504998094068976, -6.3448349392860401388,
        ),
        (0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
        (0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
        (0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
        (0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
        (
            0.0, -7.6142658045872677172, 52.2273532792945524050,
            -121.4999627731334642623, 116.4422149550342161651, -39.6107919852202505218,
        ),
        (
            0.0, 10.7281392630428866124, -46.8919164181093621583,
            83.1721004639847717481, -67.1451318825957197185, 20.3761213808791436958,
        ),
        (
            0.0, 0.5526637063753648783, -0.1890893225010595467,
            9.5724507555993664382, -16.5672243527496524646, 7.3347098826795362023,
        ),
        (
            0.0, 4.2186562625665153803, -35.7075975946222072821,
            87.8406057677205645007, -89.9916014847245016028, 32.8801774352459155182,
        ),
        (
            0.0, -0.6627209125361597559, 6.2736448083240352160,
            -17.4152107770762969005, 22.6237489648532849093, -10.1588990526426760954,
        ),
        (
            0.0, -1.2636789001135462218, 10.3160881272450748458,
            -28.5903289514790976966, 32.2362340167355370113, -12.5401268098782561200,
        ),
        (
            0.0, 5.4106037898590422230, -34.7650769866611817349,
            81.6630950584341412934, -82.1020315488359848644, 29.5553001484516038033,
        ),
        (
            0.0, -7.0321379067945741781, 47.7457971078225540396,
            -114.9375291377009418170, 116.2662185791119533462, -41.7923486424390588923,
        ),
        (
            0.0, 2.3537586759714983486, -19.0082099341608028453,
            50.2558364226176017553, -53.9020777466385396792, 20.3006925822100825485,
        ),
    ),
    p_order=5,
)
# fmt: on

BOSH3 = ButcherTableau(  # Bogacki and Shampine 1989, doi 10.1016/0893-9659(89)90079-7
    order=3,
    c=(0.0, 1 / 2, 3 / 4, 1.0),
    a=((), (1 / 2,), (0.0, 3 / 4), (2 / 9, 1 / 3, 4 / 9)),
    b=(2 / 9, 1 / 3, 4 / 9, 0.0),
    e=(-5 / 72, 1 / 12, 1 / 9, -1 / 8),
    p=hermite((2 / 9, 1 / 3, 4 / 9, 0.0)),
    p_order=3,
)

# The slope with which the next step begins is f at a point dt/512 (k_2 - k_0) beside y1.
FEHLBERG2 = ButcherTableau(  # Fehlberg 1969, NASA TR R-315, RK1(2), advanced with the weights of order 2
    order=2,
    c=(0.0, 1 / 2, 1.0),
    a=((), (1 / 2,), (1 / 256, 255 / 256)),
    b=(1 / 512, 255 / 256, 1 / 512),
    e=(-1 / 512, 0.0, 1 / 512),
    p=quadratic((1 / 512, 255 / 256, 1 / 512)),
    p_order=2,
)

# The slope with which the next step begins is f at the Euler step: predict, evaluate, correct, with one evaluation a step.
ADAPTIVE_HEUN = ButcherTableau(  # Heun 1900 with Euler embedded: Hairer, Norsett and Wanner I, II.4
    order=2,
    c=(0.0, 1.0),
    a=((), (1.0,)),
    b=(1 / 2, 1 / 2),
    e=(1 / 2, -1 / 2),
    p=quadratic((1 / 2, 1 / 2)),
    p_order=2,
)

EULER = ButcherTableau(order=1, c=(0.0,), a=((),), b=(1.0,), p=((1.0,),), p_order=1)  # Euler 1768

MIDPOINT = ButcherTableau(  # Runge 1895, doi 10.1007/BF01446807
    order=2,
    c=(0.0, 1 / 2),
    a=((), (1 / 2,)),
    b=(0.0, 1.0),
    p=quadratic((0.0, 1.0)),
    p_order=2,
)

HEUN2 = ButcherTableau(  # Heun 1900
    order=2,
    c=(0.0, 1.0),
    a=((), (1.0,)),
    b=(1 / 2, 1 / 2),
    p=quadratic((1 / 2, 1 / 2)),
    p_order=2,
)

HEUN3 = ButcherTableau(  # Heun 1900
    order=3,
    c=(0.0, 1 / 3, 2 / 3),
    a=((), (1 / 3,), (0.0, 2 / 3)),
    b=(1 / 4, 0.0, 3 / 4),
    p=quadratic((1 / 4, 0.0, 3 / 4)),
    p_order=2,
)

RK4 = ButcherTableau(  # the 3/8 rule: Kutta 1901. Interpolant: the cubic that meets all order conditions up to 3
    order=4,
    c=(0.0, 1 / 3, 2 / 3, 1.0),
    a=((), (1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)),
    b=(1 / 8, 3 / 8, 3 / 8, 1 / 8),
    p=((1.0, -15 / 8, 1.0), (0.0, 15 / 8, -3 / 2), (0.0, 3 / 8, 0.0), (0.0, -3 / 8, 1 / 2)),
    p_order=3,
)

ADAPTIVE: dict[str, ButcherTableau] = {
    "dopri8": DOPRI8,
    "dopri5": DOPRI5,
    "tsit5": TSIT5,
    "bosh3": BOSH3,
    "fehlberg2": FEHLBERG2,
    "adaptive_heun": ADAPTIVE_HEUN,
}
FIXED: dict[str, ButcherTableau] = {"euler": EULER, "midpoint": MIDPOINT, "heun2": HEUN2, "heun3": HEUN3, "rk4": RK4}

# With each interpolant for outputs inside a step, made once: torch.compile does not follow the checks of a tableau.
INTERPOLATIONS: dict[str, dict[str, ButcherTableau]] = {
    "method": {**ADAPTIVE, **FIXED},
    "linear": {name: tableau.linear() for name, tableau in (ADAPTIVE | FIXED).items()},
    "cubic": {name: tableau.cubic() for name, tableau in (ADAPTIVE | FIXED).items()},
}

# What torchdiffeq has and this package does not have yet.
ABSENT = (
    "explicit_adams",
    "implicit_adams",
    "fixed_adams",
    "implicit_euler",
    "implicit_midpoint",
    "trapezoid",
    "radauIIA3",
    "gl4",
    "radauIIA5",
    "gl6",
    "sdirk2",
    "trbdf2",
    "scipy_solver",
)


def find_method(name: str) -> ButcherTableau:
    """The tableau called `name`. Raises NotImplementedError for a torchdiffeq method that is missing here, else ValueError."""
    tableau = ADAPTIVE.get(name) or FIXED.get(name)
    if tableau is not None:
        return tableau
    known = ", ".join([*ADAPTIVE, *FIXED])
    if name in ABSENT:
        raise NotImplementedError(f"method {name!r} is not part of this version of odenet_cuda; there are {known}")
    raise ValueError(f"method must be one of {known}; got {name!r}")

"""Programs written for torchdiffeq run alike with odenet_cuda in its place: ``python tests/clients.py``, ``make test-clients``.

Fetches each with git, and what it needs with pip, into folders of their own: the environment that runs this keeps its packages.
pip is told --no-deps, for some ask for a torch of their own. Then runs their tests and examples, unchanged, twice: as they are,
and with ``sys.modules["torchdiffeq"] = odenet_cuda`` before anything else is imported. Prints how many pass both ways, and
every test that torchdiffeq passes and odenet_cuda does not; with such a one it ends as failed. Two hours on two cores.
``make test-clients ONLY="torchcde torchdyn"`` runs some.

What fails both ways is printed too, as torchdyn's tests that load whole models, which torch.load no longer does unasked.
``excused`` holds what may differ, and why.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ALIAS = 'import sys\nimport odenet_cuda\nsys.modules["torchdiffeq"] = odenet_cuda\n'
TOO_LONG = 1800


@dataclass(frozen=True)
class Client:
    """url, commit: what git fetches. tests: for pytest. programs: each with its arguments. packages: what pip installs for it
    besides `PACKAGES`. source: the folder of its modules. excused: a test, or the beginning of its name, and why it may
    differ."""

    url: str
    commit: str
    tests: tuple[str, ...] = ()
    programs: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    source: str = "."
    excused: dict[str, str] = field(default_factory=dict)


PACKAGES = ("torchdiffeq==0.2.5", "torchsde==0.2.6", "trampoline", "torchtyping==0.1.5", "typeguard==2.13.3")
LIGHTNING = (
    "pytorch-lightning==2.6.6", "lightning-fabric==2.6.6", "lightning-utilities", "torchmetrics", "fsspec", "pyyaml", "tqdm",
)  # fmt: skip
NEUROMANCER = (
    *LIGHTNING, "neuromancer==1.5.6", "certifi", "charset-normalizer", "dill", "graphviz", "idna", "lightning==2.6.6",
    "llvmlite==0.50.0", "numba==0.68.1", "pandas", "plum-dispatch==1.7.3", "pydot==1.4.2", "pyts==0.14.1", "pytz", "requests",
    "six", "toml", "urllib3",
)  # fmt: skip
CLIENTS = {
    "torchdiffeq": Client(
        "https://github.com/rtqichen/torchdiffeq",
        "657943acefa826ef04c025ebeb1ff5e9d60dc268",
        tests=(
            "tests/api_tests.py",
            "tests/event_tests.py",
            "tests/gradient_tests.py",
            "tests/norm_tests.py",
            "tests/odeint_tests.py",
        ),
        excused={
            "tests.norm_tests.TestNorms.test_adjoint_norm": "reads, for a tuple state, what is two nodes up in the graph, "
            "and expects the state there as one vector",
        },
        programs=(
            "examples/ode_demo.py --niters 20",
            "examples/ode_demo.py --niters 20 --adjoint",
            "examples/bouncing_ball.py 5",
            "examples/bouncing_ball.py 5 --adjoint",
            "examples/cnf.py --niters 5",
            "examples/cnf.py --niters 5 --adjoint",
            "examples/latent_ode.py --niters 5",
            "examples/latent_ode.py --niters 5 --adjoint True --visualize True",
            "examples/learn_physics.py --num_iterations 3",
            "examples/learn_physics.py --num_iterations 3 --no_events",
        ),
    ),
    "torchcde": Client(
        "https://github.com/patrick-kidger/torchcde", "9ff6aba4738989dc5fe3aee86d45812c318f6231", tests=("test",)
    ),
    "stribor": Client("https://github.com/mbilos/stribor", "f5ba941bf9d69e160d75e191ac622dd2b38260cd", tests=("stribor/test",)),
    "torchflows": Client(
        "https://github.com/davidnabergoj/torchflows",
        "10b6d6e167c1d974c54dc0d75d964428e44420f3",
        tests=tuple(
            f"test/test_{name}.py"
            for name in (
                "cnf_event_shapes",
                "cnf_tolerance",
                "ddnf",
                "deepcopy",
                "ot_flow",
                "stochastic_log_det_estimation",
                "fit",
            )
        ),
    ),
    "torchdyn": Client(
        "https://github.com/DiffEqML/torchdyn",
        "95cc74b0e35330b03d2cd4d875df362a93e1b5ea",
        tests=("test",),
        packages=(*LIGHTNING, "torchcde==0.2.5", "attrs"),
    ),
    "flow_matching": Client(
        "https://github.com/facebookresearch/flow_matching", "11568d37f8d5a080e12aa7b5305d9c35ae07d136", tests=("tests",)
    ),
    "neuromancer": Client(
        "https://github.com/pnnl/neuromancer",
        "d93bf890545d4a36cbe2bbe90695f0b77770a392",
        tests=("tests/test_integrators.py", "tests/test_ode.py", "tests/test_system.py", "tests/psl/test_nonautonomous.py"),
        packages=NEUROMANCER,
        source="src",
    ),
    "chirho": Client(
        "https://github.com/BasisResearch/chirho",
        "8ba2c39d8e0102dde872ece938211d4d88329996",
        tests=("tests/dynamical",),
        packages=("pyro-ppl==1.9.2", "pyro-api==0.1.2", "opt-einsum"),
    ),
    "gradnet": Client(
        "https://github.com/mikaberidze/gradnet",
        "a654b70fd298de54ccc7204c057b6e170e9346a6",
        tests=("tests/test_ode.py", "tests/test_sparse_dense_diffusion_event_time.py"),
        packages=LIGHTNING,
        source="src",
    ),
}


def run(*command: object, **options) -> None:
    subprocess.run([str(part) for part in command], check=True, **options)


def fetch(name: str, client: Client, folder: Path) -> Path:
    """The checkout of this client, at its commit."""
    checkout = folder / name
    if not checkout.exists():
        run("git", "clone", "--quiet", client.url, checkout)
        run("git", "-C", checkout, "checkout", "--quiet", client.commit)
    return checkout


def install(target: Path, packages: Sequence[str]) -> Path:
    """The folder of these, fetched anew where they were others or did not all come."""
    listed = target / "installed.txt"
    if packages and not (listed.exists() and listed.read_text().split() == list(packages)):
        shutil.rmtree(target, ignore_errors=True)
        run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", target, *packages)
        listed.write_text("\n".join(packages))
    return target


def tested(client: Client, checkout: Path, settings: dict[str, str], report: Path) -> dict[str, str]:
    """What became of each test, by name."""
    if not client.tests:
        return {}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", f"--junitxml={report}"]
    subprocess.run([*command, *client.tests], cwd=checkout, env=settings, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case} & {"failure", "error", "skipped"}
        name = f"{case.get('classname')}.{case.get('name')}"
        found[name] = "failed" if kinds - {"skipped"} or found.get(name) == "failed" else "skipped" if kinds else "passed"
    return found


def ran(client: Client, checkout: Path, settings: dict[str, str], folder: Path) -> dict[str, str]:
    """What became of each program."""
    found = {}
    for program in client.programs:
        script, *arguments = program.split()
        with tempfile.TemporaryDirectory(dir=folder) as place:
            command = [sys.executable, checkout / script, *arguments]
            done = subprocess.run(command, cwd=place, env=settings, capture_output=True, timeout=TOO_LONG, text=True)
        found[program] = "passed" if done.returncode == 0 else "failed"
        if done.returncode:
            print(f"{program}: {done.stderr.strip().splitlines()[-1][:300]}")
    return found


def differing(client: Client, plain: dict[str, str], alias: dict[str, str]) -> list[str]:
    """What torchdiffeq passes and odenet_cuda does not, but for what is excused."""
    names = [name for name, how in plain.items() if how == "passed" and alias.get(name) != "passed"]
    return [name for name in names if not any(name.startswith(known) for known in client.excused)]


def count(found: dict[str, str]) -> str:
    how = list(found.values())
    return f"{how.count('passed')} of {len(how) - how.count('skipped')}"


def look(name: str, folder: Path, programs: bool) -> list[str]:
    client = CLIENTS[name]
    try:
        checkout, packages = fetch(name, client, folder), install(folder / "packages", PACKAGES)
        own = install(folder / f"packages-{name}", client.packages)
    except subprocess.CalledProcessError as error:
        print(f"{name:12} could not be fetched: {error}", flush=True)
        return [name]
    (folder / "alias").mkdir(exist_ok=True)
    (folder / "alias" / "sitecustomize.py").write_text(ALIAS)
    found, seconds = [], []
    for alias in (False, True):
        begin, first = time.perf_counter(), [folder / "alias", ROOT] if alias else []
        paths = os.pathsep.join(map(str, [*first, checkout / client.source, own, packages]))
        settings = {**os.environ, "PYTHONPATH": paths, "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}
        of_tests = tested(client, checkout, settings, folder / "report.xml")
        found.append({**of_tests, **(ran(client, checkout, settings, folder) if programs else {})})
        seconds.append(time.perf_counter() - begin)
    differ = differing(client, *found)
    plain, alias_too = map(count, found)
    print(f"{name:12} torchdiffeq {plain}, {seconds[0]:.0f} s; odenet_cuda {alias_too}, {seconds[1]:.0f} s", flush=True)
    if "passed" not in found[0].values():
        differ.append("anything: it does not run here")
    for one in differ:
        print(f"    torchdiffeq alone passes {one}")
    for one in [one for one, how in found[0].items() if how == "failed"]:
        print(f"    torchdiffeq fails {one}; odenet_cuda: {found[1].get(one, 'not run')}")
    for one, reason in client.excused.items():
        print(f"    excused: {one}: {reason}")
    return differ


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=sorted(CLIENTS), help="some of them")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "clients", help="where they are kept (build/clients)")
    parser.add_argument("--no-programs", action="store_true", help="tests alone, no examples")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    names = arguments.only or list(CLIENTS)
    if any([look(name, folder, not arguments.no_programs) for name in names]):
        raise SystemExit("a program that torchdiffeq serves is not served, or was not to be had")


if __name__ == "__main__":
    main()

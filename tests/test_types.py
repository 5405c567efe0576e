"""The types that calls have for a user's type checker: none is Any where it is known."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_a_users_program(monkeypatch):
    """Every `assert_type` in it holds, and every ``type: ignore`` in it hides an error."""
    api = pytest.importorskip("mypy.api")
    if not (ROOT / "pyproject.toml").exists():
        pytest.skip("needs the checkout")
    monkeypatch.chdir(ROOT)
    # The settings of `make lint`, so that both share what mypy keeps of torch, which it takes long to read.
    out, errors, status = api.run(["--strict-equality", "--warn-unused-ignores", "tests/users_program.py"])
    assert status == 0, out + errors


def test_it_is_marked_as_typed():
    import odenet_cuda

    assert (Path(odenet_cuda.__file__).parent / "py.typed").exists()

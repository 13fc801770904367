"""pytest fixtures for code that deploys to Modal; the SDK in it stays as it is.

In a test module or the root conftest.py:

    pytest_plugins = ["trunkline_dev.modal.fixtures"]
"""

import warnings
from collections.abc import Iterator

import modal
import pytest

from trunkline_dev.modal.running import TOKEN, Running, running


@pytest.fixture
def local_modal_flags() -> list[str]:
    """Flags of the local Modal; override it in a module that wants others."""
    return []


@pytest.fixture
def local_modal(local_modal_flags: list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    """A local Modal of the test's own, which the SDK and its command line find by the environment."""
    with running(local_modal_flags) as local:
        for name, value in local.environment.items():
            monkeypatch.setenv(name, value)
        yield local


@pytest.fixture
def modal_client(local_modal: Running) -> Iterator[modal.Client]:
    """A client of it. The one that the SDK makes by itself stays with the first server it has seen."""
    assert local_modal
    with warnings.catch_warnings():  # it is made before the test's loop runs
        warnings.simplefilter("ignore")
        client = modal.Client.from_credentials(*TOKEN)
    yield client
    client.close()

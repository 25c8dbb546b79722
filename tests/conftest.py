"""Four CPU devices for every test, set before anybody imports jax."""

import os
import signal

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4".strip()

# A shell's background job ignores Ctrl-C, and so would the programs that tests start and then interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def compiled_quickly():
    """For files that compile for longer than they run, and more than what a test could give its own jits: engines and examples have jits
    of theirs, and Mosaic's interpreter compiles in callbacks."""
    from tiny import quickly  # which imports jax

    with quickly():
        yield

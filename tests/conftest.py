"""Four CPU devices for every test, set before anybody imports jax."""

import os
import signal

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4".strip()

# A shell's background job ignores Ctrl-C, and so would the programs that tests start and then interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

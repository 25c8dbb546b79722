"""`python -m serving` is `jaxllm serve`."""

import sys

from serving.cli import main

sys.exit(main(["serve", *sys.argv[1:]]))

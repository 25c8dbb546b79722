"""The HTTP server and the command line. Importing this package imports neither JAX nor FastAPI, so that `jaxllm --help` is quick."""

from functools import cache


@cache
def version() -> str:
    """jaxllm's version: the installed distribution's, or pyproject.toml's when run from a checkout."""
    from importlib import metadata

    try:
        return metadata.version("jaxllm")
    except metadata.PackageNotFoundError:
        import tomllib
        from pathlib import Path

        return tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]["version"]

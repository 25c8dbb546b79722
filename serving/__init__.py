"""The HTTP server and the command line. Importing this package imports neither JAX nor FastAPI, so that `jaxllm --help` is quick."""

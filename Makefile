# Two commands matter: `make serve` and `make test`. Each makes .venv and installs into it once;
# afterwards it starts at once, until pyproject.toml changes.

VENV ?= .venv
PORT ?= 8000
MODEL ?=
ARGS ?=

# Interpreters to try, in order. The first that is 3.12 or newer and can make a virtual environment is taken.
PYTHONS = python3.12 python3.13 python3.14 python3 $(wildcard $(HOME)/.pyenv/versions/3.1[2-9]*/bin/python3)
USABLE = import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))
PYTHON ?= $(shell for p in $(PYTHONS) $$(uv python find '>=3.12' 2>/dev/null); do \
	"$$p" -c '$(USABLE)' 2>/dev/null && { echo "$$p"; break; }; done)

# The NVIDIA driver decides: CUDA 13 needs driver 580 or newer. No driver: jax's own CPU build. `make serve CUDA=` forces the CPU.
ifeq ($(origin CUDA), undefined)
CUDA := $(shell nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | \
	awk -F. 'NR == 1 && /^[0-9]/ {print ($$1 >= 580) ? "cuda13" : "cuda12"}')
endif

comma := ,
INSTALL = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable

.PHONY: serve test lint format docs fuzz soak clients clean

serve: $(VENV)/.installed$(CUDA)
	$(VENV)/bin/jaxllm serve $(MODEL) --port $(PORT) $(ARGS)

# A file's tests stay together, because they share what they compiled. For one process, and a debugger: ARGS="-n 0".
test: $(VENV)/.installed-dev$(CUDA)
	$(VENV)/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile $(ARGS)

lint: $(VENV)/.installed-dev$(CUDA)
	$(VENV)/bin/python -m pytest tests/test_house.py $(ARGS)

format: $(VENV)/.installed-dev$(CUDA)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

docs: $(VENV)/.installed-dev$(CUDA)
	$(VENV)/bin/python tests/server_tables.py

fuzz: $(VENV)/.installed-dev$(CUDA)
	JAXLLM_FUZZ=5000 $(VENV)/bin/python -m pytest tests/test_server_schema.py $(ARGS)

soak: $(VENV)/.installed-dev$(CUDA)
	$(VENV)/bin/python tests/soak.py $(ARGS)

clients: $(VENV)/.installed-dev$(CUDA)
	$(VENV)/bin/python tests/clients/run.py $(ARGS)

clean:
	rm -rf $(VENV) .clients build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "jaxllm needs Python 3.12 or newer with its venv module, and none was found:" \
		"install one (on Debian and Ubuntu: apt install python3.12-venv), or name it: make PYTHON=/path/to/python3" >&2; exit 1; }
	"$(PYTHON)" -c '$(USABLE)' || { echo "$(PYTHON) is not Python 3.12 or newer with its venv module" >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV)

$(VENV)/.installed$(CUDA): pyproject.toml | $(VENV)/bin/python
	@echo "Installing jaxllm$(CUDA:%=[%]) into $(VENV); the first time takes some minutes."
	$(INSTALL) '.$(CUDA:%=[%])'
	@touch $@

$(VENV)/.installed-dev$(CUDA): pyproject.toml | $(VENV)/bin/python
	@echo "Installing jaxllm[dev$(CUDA:%=$(comma)%)] into $(VENV); the first time takes some minutes."
	$(INSTALL) '.[dev$(CUDA:%=$(comma)%)]'
	@touch $@

# jaxllm on an NVIDIA GPU (driver 580 or newer, and NVIDIA's container toolkit):
#   docker build -t jaxllm .
#   docker run --gpus all -p 8000:8000 -v jaxllm-cache:/cache jaxllm [MODEL] [OPTIONS]
# jax's wheels bring their own CUDA libraries, so the base needs only what talks to the driver.
FROM nvidia/cuda:13.0.1-base-ubuntu24.04

# Without a GPU: docker build --build-arg EXTRA= .
ARG EXTRA=cuda13

# This Ubuntu's python3 is 3.12.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3 python3-venv ca-certificates \
    && rm -rf /var/lib/apt/lists/*

RUN python3 -m venv /opt/jaxllm
COPY pyproject.toml README.md LICENSE /src/
COPY jaxllm /src/jaxllm
COPY pallas_kernels /src/pallas_kernels
COPY converters /src/converters
COPY serving /src/serving
COPY bench /src/bench
RUN /opt/jaxllm/bin/python -m pip install --no-cache-dir "/src${EXTRA:+[$EXTRA]}"

# One volume holds what is slow to make again: downloaded models and compiled steps. Only this folder is written to.
ENV PATH=/opt/jaxllm/bin:$PATH HF_HOME=/cache/huggingface XDG_CACHE_HOME=/cache HOME=/cache
RUN useradd --system --no-create-home --home-dir /cache jaxllm && mkdir -p /cache && chown jaxllm /cache
USER jaxllm
WORKDIR /cache
VOLUME /cache

EXPOSE 8000
ENTRYPOINT ["jaxllm", "serve", "--host", "0.0.0.0"]

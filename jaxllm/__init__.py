"""jaxllm: Hugging Face language models served from JAX, and the same models as pure functions.

The public names load what they need when they are first used, so that `import jaxllm` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

_HOMES = {
    "BeamSearchParams": "jaxllm.beam",
    "LLM": "jaxllm.llm",
    "Engine": "jaxllm.engine",
    "EngineConfig": "jaxllm.config",
    "SamplingParams": "jaxllm.request",
    "StructuredOutputs": "jaxllm.request",
    "Request": "jaxllm.request",
    "Output": "jaxllm.request",
    "Completion": "jaxllm.request",
    "Logprob": "jaxllm.request",
    "JaxllmError": "jaxllm.request",
    "ConfigError": "jaxllm.request",
    "RequestError": "jaxllm.request",
    "EngineDeadError": "jaxllm.request",
    "ModelConfig": "converters.model_config",
    "Model": "jaxllm.research",
    "Patch": "jaxllm.patch",
    "load": "jaxllm.research",
}
__all__ = [
    "LLM",
    "BeamSearchParams",
    "Completion",
    "ConfigError",
    "Engine",
    "EngineConfig",
    "EngineDeadError",
    "JaxllmError",
    "Logprob",
    "Model",
    "ModelConfig",
    "Output",
    "Patch",
    "Request",
    "RequestError",
    "SamplingParams",
    "StructuredOutputs",
    "load",
]
__version__ = "0.1.0"

if TYPE_CHECKING:
    from converters.model_config import ModelConfig as ModelConfig
    from jaxllm.beam import BeamSearchParams as BeamSearchParams
    from jaxllm.config import EngineConfig as EngineConfig
    from jaxllm.engine import Engine as Engine
    from jaxllm.llm import LLM as LLM
    from jaxllm.patch import Patch as Patch
    from jaxllm.request import Completion as Completion
    from jaxllm.request import ConfigError as ConfigError
    from jaxllm.request import EngineDeadError as EngineDeadError
    from jaxllm.request import JaxllmError as JaxllmError
    from jaxllm.request import Logprob as Logprob
    from jaxllm.request import Output as Output
    from jaxllm.request import Request as Request
    from jaxllm.request import RequestError as RequestError
    from jaxllm.request import SamplingParams as SamplingParams
    from jaxllm.request import StructuredOutputs as StructuredOutputs
    from jaxllm.research import Model as Model
    from jaxllm.research import load as load


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'jaxllm' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)

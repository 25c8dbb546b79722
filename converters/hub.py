"""From what the user calls a model to a local folder: a folder as it is, or a snapshot of a Hugging Face repository.

Only what serving needs is downloaded: config, tokenizer, and one form of the weights. The cache, HF_TOKEN, HF_ENDPOINT and
HF_HUB_OFFLINE are huggingface_hub's own; a repository that is already in the cache needs no network.
"""

import os
from pathlib import Path

SMALL = ("*.json", "*.model", "*.txt", "*.jinja")  # configs, index, tokenizers (sentencepiece; vocab and merges), chat templates
SAFETENSORS = ("*.safetensors",)
PYTORCH = ("pytorch_model*.bin",)
OTHERS = ("*/*", "consolidated*")  # the same weights in other forms: original/, onnx/, ...


def fetch(
    model: str, *, revision: str | None = None, download_dir: str | Path | None = None, weights: bool = True, load_format: str = "auto"
) -> Path:
    """The folder of `model`. revision: branch, tag or commit; download_dir: another cache than huggingface_hub's.

    load_format as in open_checkpoint: "pt" downloads .bin files, the others safetensors, or .bin where there are none.
    Raises FileNotFoundError for a folder or repository that is not there, PermissionError for one we may not read,
    ConnectionError if the Hub cannot be reached and the cache cannot help.
    """
    if Path(model).expanduser().is_dir():
        return Path(model).expanduser()
    if model.startswith(("/", ".", "~")) or model.count("/") > 1:
        raise FileNotFoundError(f"there is no folder {model}; a model is a folder, or a Hub id such as Qwen/Qwen3-0.6B")
    if load_format == "orbax":
        raise FileNotFoundError(
            f"there is no folder {model} here, and no Hub repository is in Orbax's format; make one with jaxllm convert"
        )
    if not weights or load_format == "dummy":
        return _snapshot(model, revision, download_dir, ())
    first = PYTORCH if load_format == "pt" else SAFETENSORS
    folder = _snapshot(model, revision, download_dir, first)
    if load_format == "auto" and not list(folder.glob("*.safetensors")):
        folder = _snapshot(model, revision, download_dir, PYTORCH)
    return folder


def _snapshot(model: str, revision: str | None, download_dir: str | Path | None, weights: tuple[str, ...]) -> Path:
    # Here, because a start from a folder needs none of it, and it takes 0.2 s to import.
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    endpoint = os.environ.get("HF_ENDPOINT") or constants.ENDPOINT
    at = f"{model}, revision {revision}," if revision else model
    try:
        folder = snapshot_download(
            model,
            revision=revision,
            cache_dir=download_dir,
            endpoint=endpoint,
            token=os.environ.get("HF_TOKEN") or None,
            allow_patterns=[*SMALL, *weights],
            ignore_patterns=list(OTHERS),
        )
    except HFValidationError as error:
        raise FileNotFoundError(f"{model!r} is neither a folder here nor a Hub id such as Qwen/Qwen3-0.6B") from error
    except GatedRepoError as error:
        raise PermissionError(f"{model} is gated: accept its terms at {endpoint}/{model}, then set HF_TOKEN to a token of yours") from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(f"{model} at {endpoint} has no revision {revision!r}") from error
    except RepositoryNotFoundError as error:
        token = "HF_TOKEN does not open it" if os.environ.get("HF_TOKEN") else "it is private and HF_TOKEN is not set"
        raise FileNotFoundError(f"there is no folder {model} here and no model {model} at {endpoint}, or {token}") from error
    except LocalEntryNotFoundError as error:
        cache = download_dir or constants.HF_HUB_CACHE
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{endpoint} cannot be reached"
        raise ConnectionError(f"{at} is not in the cache {cache}, and {why}; give a local folder, or go online once") from error
    except HfHubHTTPError as error:
        raise ConnectionError(f"{endpoint} answered {error.response.status_code} when asked for {at}; try again later") from error
    return Path(folder)

"""A model's config.json as a family reads it: every key that is read is remembered, and a key that nobody read is refused.

A key we ignore is a network we get wrong without noticing. What only matters in training, in bookkeeping or to another
program is in HARMLESS; a key there is a promise that it cannot change a logit.
"""

from collections.abc import Iterable, Mapping
from typing import Any

_TRAINING = """
    activation_dropout attention_dropout attn_pdrop classifier_dropout dropout embd_pdrop hidden_dropout init_std initializer_range
    layerdrop output_router_logits pretraining_tp resid_pdrop router_aux_loss_coef router_jitter_noise
"""
_BOOKKEEPING = """
    _attn_implementation _attn_implementation_autoset _commit_hash _name_or_path architectures auto_map bos_token_id cache_implementation
    chunk_size_feed_forward dtype eos_token_id id2label is_decoder is_llama_config keys_to_ignore_at_inference label2id model_type
    num_labels output_attentions output_hidden_states pad_token_id prefix problem_type return_dict task_specific_params tokenizer_class
    torch_dtype transformers.js_config transformers_version unsloth_fixed unsloth_version use_cache
"""
_GENERATION = "do_sample max_length max_new_tokens min_length num_beams repetition_penalty temperature top_k top_p"  # old configs
_SAID_TWICE = "_sliding_window_pattern"  # layer_types says the same
HARMLESS = frozenset(f"{_TRAINING} {_BOOKKEEPING} {_GENERATION} {_SAID_TWICE}".split())


class Read(dict):
    """A config that remembers which of its keys were read. A key that must be there and is not is a ValueError."""

    def __init__(self, config: Mapping[str, Any], what: str):
        super().__init__(config)
        self.what = what
        self.keys_read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.keys_read.add(key)
        if key not in self.keys():
            raise ValueError(f"{self.what} has no {key!r}, which this model needs")
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.keys_read.add(key)
        return super().get(key, default)

    def refuse_unread(self, ours: Iterable[str], harmless: frozenset[str] = frozenset()) -> None:
        """Raises ValueError for those of the keys `ours` that are set (not None, False, 0 or empty), unread, and not harmless."""
        unread = {key: value for key in ours if (value := super(Read, self).get(key)) and key not in self.keys_read | harmless}
        if unread:
            raise ValueError(f"{self.what} sets {unread}, which we do not support; what we left unread could change the answers")


def merge(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with `overrides` laid over it; where both hold a dict the two are merged."""
    merged = dict(config)
    for key, value in overrides.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both else value
    return merged

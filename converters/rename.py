"""From a checkpoint's tensor names to ours: a family's rules, applied. Nothing is read here, tensors stay on disk.

A rule's key is a regular expression over the start of a stored name, its value what becomes of the tensor:
a string renames it, Split and Interleaved cut one tensor in several, Stack gathers one tensor an expert, None drops it.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .tensor import Tensor, interleaved_rows, rows, stack


@dataclass(frozen=True)
class Split:
    """Cut a tensor's rows into `parts`; `sizes` gives their numbers of rows from the config."""

    parts: tuple[str, ...]
    sizes: Callable[[Mapping[str, Any]], tuple[int, ...]]


@dataclass(frozen=True)
class Interleaved:
    """Rows go head by head through all `parts`; `heads` counts them from the config."""

    parts: tuple[str, ...]
    heads: Callable[[Mapping[str, Any]], int]


@dataclass(frozen=True)
class Stack:
    """Gather along a new first axis; the rule's second group is the position there."""

    name: str


Rules = dict[str, str | Split | Interleaved | Stack | None]


def rename(stored: Mapping[str, Tensor], rules: Rules, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Raises ValueError for a tensor without a rule, or a gap in a stack."""
    ours: dict[str, Tensor] = {}
    stacks: dict[str, dict[int, Tensor]] = {}
    compiled = [(re.compile(pattern), rule) for pattern, rule in rules.items()]
    for name, tensor in stored.items():
        match, rule = next(((match, rule) for pattern, rule in compiled if (match := pattern.match(name))), (None, None))
        if match is None:
            raise ValueError(f"the checkpoint has a tensor {name!r} of shape {tensor.shape}, which this family has no place for")
        rest = name[match.end() :]
        if isinstance(rule, str):
            ours[match.expand(rule) + rest] = tensor
        elif isinstance(rule, Stack):
            stacks.setdefault(match.expand(rule.name) + rest, {})[int(match[2])] = tensor
        elif rule is not None:
            ours |= {match.expand(part) + rest: t for part, t in _cut(name, tensor, rule, config).items()}
    return ours | {name: _stacked(name, parts) for name, parts in stacks.items()}


def _cut(name: str, tensor: Tensor, rule: Split | Interleaved, config: Mapping[str, Any]) -> dict[str, Tensor]:
    if isinstance(rule, Interleaved):
        heads = rule.heads(config)
        if tensor.shape[0] % (heads * len(rule.parts)):
            raise ValueError(f"{name!r} has {tensor.shape[0]} rows, which {heads} heads of {len(rule.parts)} parts do not divide")
        return {part: interleaved_rows(tensor, i, len(rule.parts), heads) for i, part in enumerate(rule.parts)}
    sizes = rule.sizes(config)
    if tensor.shape[0] != sum(sizes):
        raise ValueError(f"{name!r} has {tensor.shape[0]} rows, but the config makes it {' + '.join(map(str, sizes))} = {sum(sizes)}")
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return {part: rows(tensor, start, size) for part, start, size in zip(rule.parts, starts, sizes, strict=True)}


def _stacked(name: str, parts: dict[int, Tensor]) -> Tensor:
    if gaps := set(range(max(parts) + 1)) - parts.keys():
        raise ValueError(f"the checkpoint has {len(parts)} of the tensors that make {name!r}; number {min(gaps)} is missing")
    if len({(t.shape, t.dtype) for t in parts.values()}) > 1:
        raise ValueError(
            f"the tensors that make {name!r} differ in shape or type: {sorted({str((t.shape, t.dtype)) for t in parts.values()})}"
        )
    return stack([parts[i] for i in range(len(parts))])

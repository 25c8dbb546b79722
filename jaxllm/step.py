"""What runs on the device in one step, as pure functions that Runner compiles: model and draw, and the admission of rows.

S row slots and the spare one that padding uses, M rows of a bucket, T chunk lanes, N = M + T tokens, P pages of a row,
V vocabulary, C log-probabilities wanted, A rows admitted at once.
"""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh

from converters.model_config import ModelConfig
from jaxllm import sample
from jaxllm.batch import repeats, repetition, tables, unpack
from jaxllm.cache import PAGE_AXES, Cache
from jaxllm.decoder import Attention, Decoder
from jaxllm.parallel import on_each, sharding, spec
from jaxllm.patch import Patch, Patching
from jaxllm.plan import Bucket, Plan
from jaxllm.request import MAX_BIAS, MAX_STOP_IDS
from jaxllm.scheduler import Sequence
from jaxllm.sharded import ShardedLinears
from pallas_kernels import Linears, ManyRows, Rows, Work, head_for, join_devices, linears_for, paged_attention, plan_work, write_kv


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PagedContext:
    """How a layer attends in a step: it writes its K and V into their pages, then reads the rows' pages."""

    rows: Rows
    kv_slot_N: Array
    works: dict[str, Work]  # by window
    mesh: Mesh = field(metadata={"static": True})
    linears: Linears | ShardedLinears | None
    patching: Patching | None = None

    def attend(self, q_NQH: Array, k_NKH: Array, v_NKH: Array, kv, *, scale: float, window: int | None, softcap: float | None):
        def local(q, k, v, k_pages, v_pages, slots, rows, work):
            k_pages, v_pages = write_kv(k_pages, v_pages, k, v, slots, implementation=work.implementation, interpret=work.interpret)
            return paged_attention(q, k_pages, v_pages, rows, work, scale=scale, window=window, softcap=softcap), (k_pages, v_pages)

        heads, kv_heads, pages, whole = spec((None, "heads", None)), spec((None, "kv", None)), spec(PAGE_AXES), spec(())
        given = (heads, kv_heads, kv_heads, pages, pages, whole, whole, whole)
        run = on_each(self.mesh, local, given, (heads, (pages, pages)))
        return run(q_NQH, k_NKH, v_NKH, *kv, self.kv_slot_N, self.rows, self.works[str(window)])

    def attend_product(self, normed: Any, attn: Attention, kv, cos_sin: tuple[Array, Array] | None):
        norms = [None if norm is None else norm.rms() for norm in (attn.q_norm, attn.k_norm)]
        linears = self.linears.each if isinstance(self.linears, ShardedLinears) else self.linears
        assert linears is not None

        def local(normed, weight_FD, bias_F, norms_H, cos_sin, k_pages, v_pages, slots, rows, work):
            q_NQH, k_pages, v_pages = linears.heads(
                normed,
                weight_FD,
                k_pages,
                v_pages,
                slots,
                heads=len(weight_FD) // attn.head_dim - 2 * k_pages.shape[1],
                bias_F=bias_F,
                cos_sin=cos_sin,
                q_norm_H=norms_H[0],
                k_norm_H=norms_H[1],
                eps=norms[0].eps if norms[0] else 0.0,
                offset=norms[0].offset if norms[0] else 0.0,
                implementation=work.implementation,
                interpret=work.interpret,
            )
            options = dict(scale=attn.scale, window=attn.window, softcap=attn.softcap)
            return paged_attention(q_NQH, k_pages, v_pages, rows, work, **options), (k_pages, v_pages)

        features, pages, whole = spec(("heads",)), spec(PAGE_AXES), spec(())
        given = (whole, spec(("heads", None)), features, whole, whole, pages, pages, whole, whole, whole)
        run = on_each(self.mesh, local, given, (spec((None, "heads", None)), (pages, pages)))
        bias, norms_H = attn.qkv.bias, [None if norm is None else norm.weight_D for norm in norms]
        weights = attn.qkv.weight[...], None if bias is None else bias[...], norms_H
        return run(normed, *weights, cos_sin, *kv, self.kv_slot_N, self.rows, self.works[str(attn.window)])

    def visits(self, layer: int, kv) -> bool:
        return self.patching is not None and self.patching.patch.visits(layer)

    def visit(self, layer: int, site: str, value_ND: Array, kv):
        return value_ND if self.patching is None else self.patching(layer, site, value_ND), kv


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Ports:
    """Where a step of M rows leaves what it made. They are donated and come back, so they stay where they are on the device.

    tokens: of each repetition; those that did not run are left as they were. The rest is the last one's.
    head: slot, length with the tokens just run, and whether the row samples: with the seeds, all that a draw depends on.
    hidden: the last token's, after the final norm, for those who want an embedding.
    """

    tokens_RM: Array
    logits_MV: Array
    head_3M: Array
    hidden_MD: Array

    @classmethod
    def shapes(cls, rows: int, model: ModelConfig, plan: Plan) -> "Ports":
        """The ports' shapes and types, in place of arrays."""
        f: Any = jax.ShapeDtypeStruct
        logits, hidden = f((rows, model.vocab_size), jnp.float32), f((rows, model.d_model), plan.dtype)
        return cls(f((plan.decode_steps, rows), jnp.int32), logits, f((3, rows), jnp.int32), hidden)


def model_step(
    decoder: Decoder,
    plan: Plan,
    mesh: Mesh,
    implementation: str,
    bucket: Bucket,
    cache: Cache,
    last_S: Array,
    table_SP: Array,
    floats_SF: Array,
    ints_SI: Array,
    inbox: Array,
    ports: Ports,
    addresses_WV2: Array | None = None,
    patch: Patch | None = None,
    patch_S: dict[str, Array] | None = None,
) -> tuple[Cache, Array, Array, Ports, tuple[Array, ...]]:
    """One dispatch: (cache, last_S, table_SP, ports, prompt log-probabilities of a scored bucket). `inbox` is what `batch.pack` made.

    Rows that decode do so as often as they draw, each on the token it drew before, all of them in the last turn.
    Each row's token is drawn by temperature, top-k, top-p and min-p; what `draw_edited` adds to that, it adds afterwards.
    addresses_WV2: of the plan's mailboxes (sharded.py). patch_S: what each row slot brings for the patch.
    """
    slot_M = inbox[: bucket.rows]
    sampling = sample.Sampling.unpack(floats_SF[slot_M], ints_SI[slot_M])
    table_SP, table_MP = tables(inbox, bucket, plan.page_size, table_SP)
    one = partial(_one_step, decoder, plan, mesh, implementation, bucket, table_MP, sampling, addresses_WV2, patch, patch_S)
    if bucket.chunk or plan.decode_steps == 1:
        cache, last_S, ports, prompt = one(inbox, jnp.int32(0), cache, last_S, ports)
        return cache, last_S, table_SP, ports, prompt

    turns = repeats(inbox, bucket)

    def again(i, state):
        return one(repetition(inbox, bucket, i, turns), i, *state)[:-1]

    cache, last_S, ports = lax.fori_loop(jnp.int32(0), turns, again, (cache, last_S, ports))
    return cache, last_S, table_SP, ports, ()


def _one_step(
    decoder, plan, mesh, implementation, bucket, table_MP, sampling, addresses_WV2, patch, patch_S, packed, i, cache, last_S, ports
):
    """Model and draw once; `i` of the repetitions came before."""
    batch = unpack(packed, bucket, plan.page_size, last_S, table_MP)
    patching = None if patch is None else Patching(patch_S or {}, batch.slot_N, batch.position_N, patch)
    # The fused kernels have no sites.
    linears = _linears(decoder, plan, mesh, implementation, bucket, batch.rows, addresses_WV2) if patch is None else None
    skips = isinstance(linears, ManyRows) and linears.live_3 is not None
    works = _works(decoder.c, plan, implementation, batch.rows, bucket, zeros=not skips)
    context = PagedContext(batch.rows, batch.kv_slot_N, works, mesh, linears, patching)
    hidden_ND, cache = decoder(batch.token_N, batch.position_N, cache, context)
    hidden_MD = hidden_ND[batch.logit_lane_M] if bucket.chunk else hidden_ND
    logits_MV = _logits(decoder, mesh, hidden_MD, batch.rows if mesh.size == 1 else None)
    head_3M = jnp.stack([batch.slot_M, batch.length_M, batch.samples_M.astype(jnp.int32)])
    tokens_M = _sample(mesh, implementation, logits_MV, sampling, head_3M)
    last_S = _remember(last_S, batch.slot_M, batch.samples_M, tokens_M)
    prompt = ()
    if bucket.scored:
        prompt = sample.logprobs(_logits(decoder, mesh, hidden_ND[bucket.rows :]), batch.target_T, plan.max_logprobs)
    tokens_RM = lax.dynamic_update_index_in_dim(ports.tokens_RM, tokens_M, i, 0)
    return cache, last_S, Ports(tokens_RM, logits_MV, head_3M, hidden_MD), prompt


def _logits(decoder: Decoder, mesh: Mesh, hidden_BD: Array, owners: Rows | None = None) -> Array:
    """Everywhere, but first each device's part: left to itself, XLA gathers the head's weights on every device, not the logits.

    owners: the rows that the hidden states are of, where those without a token need no logits.
    """
    head = head_for(mesh.devices.item(0), len(hidden_BD), hidden_BD.dtype, owners)
    if head is not None:
        vocab = "vocab" if decoder.c.vocab_size % mesh.size == 0 else None
        head = on_each(mesh, head, (spec(()), spec((vocab, None))), spec((None, vocab)))
    logits_BV = decoder.logits(hidden_BD, head)
    for axes in ((None, "vocab"), (None, None)) if mesh.size > 1 else ():
        logits_BV = lax.with_sharding_constraint(logits_BV, sharding(mesh, axes, logits_BV.shape))
    return logits_BV


def _linears(
    decoder: Decoder,
    plan: Plan,
    mesh: Mesh,
    implementation: str,
    bucket: Bucket,
    owners: Rows | None = None,
    addresses_WV2: Array | None = None,
) -> Linears | ShardedLinears | None:
    """How this step's layers multiply."""
    if implementation == "reference" or plan.page_dtype != plan.dtype or not decoder.usual:
        return None
    alone = mesh.size == 1
    lanes = bucket.rows + bucket.chunk
    each = linears_for(mesh.devices.item(0), lanes, plan.dtype, alone=alone, owners=owners if alone else None)
    if alone or not isinstance(each, ManyRows):
        return each
    return ShardedLinears(each, mesh, addresses_WV2 if join_devices.fits(lanes, decoder.c.d_model, plan.dtype) else None)


def ours(decoder: Decoder, plan: Plan, mesh: Mesh, implementation: str, bucket: Bucket, patch: Patch | None = None) -> bool:
    """Are all products of this step's layers kernels of ours?"""
    linears = _linears(decoder, plan, mesh, implementation, bucket) if patch is None else None
    each = linears.each if isinstance(linears, ShardedLinears) else linears
    products = {product for block in decoder.blocks for product in block.products(mesh.size)} if each else set()
    return each is not None and each.covers(bucket.rows + bucket.chunk, products)


def sums_by_mailboxes(decoder: Decoder, plan: Plan, mesh: Mesh, implementation: str, patch: Patch | None = None) -> bool:
    """Does any of this plan's steps, if it may?

    Where the vocabulary is divided, each has a sum of XLA's too, before which all devices load their kernels. Without, a kernel that waits
    for another device's could keep that device from loading it.
    """
    step = min(plan.buckets)
    linears = _linears(decoder, plan, mesh, implementation, step) if patch is None else None
    fits = join_devices.fits(step.rows + step.chunk, decoder.c.d_model, plan.dtype)
    return plan.mailboxes and isinstance(linears, ShardedLinears) and fits and decoder.c.vocab_size % mesh.size == 0


def skips_padding(decoder: Decoder, plan: Plan, mesh: Mesh, implementation: str, patch: Patch | None = None) -> bool:
    """Do this plan's steps of `WIDE_ROWS` lanes and more leave out those that hold no token?"""
    return mesh.size == 1 and ours(decoder, plan, mesh, implementation, plan.largest, patch)


def _works(model: ModelConfig, plan: Plan, implementation: str, rows: Rows, bucket: Bucket, zeros: bool) -> dict[str, Work]:
    """zeros: somebody reads lanes that no row owns."""
    return {
        str(window): plan_work(
            rows,
            page_size=plan.page_size,
            kv_heads=model.num_kv_heads // plan.tensor_parallel_size,
            group=model.num_heads // model.num_kv_heads,
            head_dim=model.head_dim,
            dtype=plan.page_dtype,
            window=window,
            chunk=bucket.chunk,
            decodes=bucket.rows > 1 or not bucket.chunk,  # the scheduler puts a lone decode into a shape without chunk lanes
            zeros=zeros,
            implementation=implementation,
        )
        for window in {layer.window for layer in model.layers}
    }


def _remember(last_S: Array, slot_M: Array, samples_M: Array, tokens_M: Array) -> Array:
    return last_S.at[jnp.where(samples_M, slot_M, last_S.shape[0] - 1)].set(tokens_M, mode="clip")


def _sample(mesh: Mesh, implementation: str, logits_MV: Array, sampling: sample.Sampling, head_3M: Array) -> Array:
    _, length_M, samples_M = head_3M
    sampling = replace(sampling, temperature_B=jnp.where(samples_M > 0, sampling.temperature_B, 0.0))  # no work for rows without a token
    run = on_each(mesh, partial(sample.sample, implementation=implementation), spec(()), spec(()))  # the same on every device
    return run(logits_MV, sampling, length_M)


EDITS = 2 * MAX_BIAS + MAX_STOP_IDS + 1  # bias ids, bias values (as bits), stop ids, the length below which those are banned


def draw_masked(mesh, implementation, last_S, floats_SF, ints_SI, banned_SW, head_3M, logits_MV) -> tuple[Array, Array, Array]:
    """(last_S, tokens_M, logits_MV): the draw without what the rows' masks ban, for steps in which no row wants more than that.

    The logits come back masked, in place of a copy of them: 39 MB of 64 rows of 151,936.
    """
    slot_M, _, samples_M = head_3M
    sampling = sample.Sampling.unpack(floats_SF[slot_M], ints_SI[slot_M])
    logits_MV = sample.mask(logits_MV, banned_SW[slot_M])
    tokens_M = _sample(mesh, implementation, logits_MV, sampling, head_3M)
    return _remember(last_S, slot_M, samples_M > 0, tokens_M), tokens_M, logits_MV


def draw_edited(
    mesh, implementation, last_S, counts_SV, floats_SF, ints_SI, edits_SE, in_prompt_SV, banned_SW, head_3M, logits_MV, *, count: int
):
    """(last_S, counts_SV, tokens_M, chosen_M, rank_M, values_MC, ids_MC): the draw with penalties, biases and bans before it.

    The log-probabilities are of the logits as they were, `count` of them.
    """
    slot_M, length_M, samples_M = head_3M
    sampling = sample.Sampling.unpack(floats_SF[slot_M], ints_SI[slot_M])
    edits = edits_SE[slot_M]
    bias_ids, stop_ids = edits[:, :MAX_BIAS], edits[:, 2 * MAX_BIAS : 2 * MAX_BIAS + MAX_STOP_IDS]
    values = jax.lax.bitcast_convert_type(edits[:, MAX_BIAS : 2 * MAX_BIAS], jnp.float32)
    edited = sample.penalize(logits_MV, counts_SV[slot_M], in_prompt_SV[slot_M], sampling)
    edited = sample.bias(edited, bias_ids, values)
    edited = sample.ban(edited, jnp.where((length_M < edits[:, -1])[:, None], stop_ids, -1))
    edited = sample.mask(edited, banned_SW[slot_M])
    tokens_M = _sample(mesh, implementation, edited, sampling, head_3M)
    counts_SV = counts_SV.at[slot_M, tokens_M].add((samples_M > 0).astype(counts_SV.dtype))
    return _remember(last_S, slot_M, samples_M > 0, tokens_M), counts_SV, tokens_M, *sample.logprobs(logits_MV, tokens_M, count)


def admit(table_SP: Array, floats_SF: Array, ints_SI: Array, edits_SE: Array, packed: Array):
    """New rows' pages and parameters, as `pack_row` wrote them. Their edits are cleared: a slot's last sequence may have left some."""
    slot, floats, ints = packed[:, 0], packed[:, 1 : 1 + sample.FLOATS], packed[:, 1 + sample.FLOATS :][:, : sample.INTS]
    pages = packed[:, 1 + sample.FLOATS + sample.INTS :]
    floats = jax.lax.bitcast_convert_type(floats, jnp.float32)
    return table_SP.at[slot].set(pages), floats_SF.at[slot].set(floats), ints_SI.at[slot].set(ints), edits_SE.at[slot].set(-1)


def admit_edits(edits_SE: Array, counts_SV: Array, in_prompt_SV: Array, head: Array, counts_V: Array, in_prompt_V: Array):
    """What one row's logits are edited by, as `pack_edits` wrote it."""
    slot = head[0]
    return edits_SE.at[slot].set(head[1:]), counts_SV.at[slot].set(counts_V), in_prompt_SV.at[slot].set(in_prompt_V)


def admit_patch(data_S: dict[str, Array], slot: Array, row: dict[str, Array]) -> dict[str, Array]:
    """What one row brings for the patch."""
    return {name: value_S.at[slot].set(row[name]) for name, value_S in data_S.items()}


def admit_masks(banned_SW: Array, slot_B: Array, banned_BW: Array) -> Array:
    """What some rows must not draw from now on (see mask.py)."""
    return banned_SW.at[slot_B].set(banned_BW)


def row_width(plan: Plan) -> int:
    return 1 + sample.FLOATS + sample.INTS + plan.max_pages


def pack_row(row: np.ndarray, sequence: Sequence) -> None:
    """Fills int32 [row_width]: slot, sampling floats (as bits), sampling ints, pages."""
    floats, ints = sample.Sampling.pack(sequence.params, sequence.seed)
    assert sequence.slot is not None
    row[0] = sequence.slot
    row[1 : 1 + sample.FLOATS] = np.array(floats, np.float32).view(np.int32)
    row[1 + sample.FLOATS : 1 + sample.FLOATS + sample.INTS] = ints
    row[1 + sample.FLOATS + sample.INTS :][: len(sequence.pages)] = sequence.pages


def pack_edits(sequence: Sequence | None, spare: int, vocab: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(slot and EDITS int32, counts int16 [V], in_prompt bool [V]) of a row; of the `spare` slot for None."""
    head = np.full(1 + EDITS, -1, np.int32)
    counts, in_prompt = np.zeros(vocab, np.int16), np.zeros(vocab, np.bool_)
    head[0] = spare
    if sequence is not None:
        params, prompt_len, edits = sequence.params, sequence.prompt_len, head[1:]
        assert sequence.slot is not None
        head[0] = sequence.slot
        edits[: len(params.logit_bias)] = list(params.logit_bias)
        values = edits[MAX_BIAS : 2 * MAX_BIAS].view(np.float32)
        values[:] = 0
        values[: len(params.logit_bias)] = list(params.logit_bias.values())
        if params.min_tokens:
            edits[2 * MAX_BIAS : 2 * MAX_BIAS + len(sequence.stop_ids)] = sorted(sequence.stop_ids)
            edits[-1] = prompt_len + params.min_tokens
        in_prompt[sequence.tokens[:prompt_len]] = True
        np.add.at(counts, sequence.tokens[prompt_len:], 1)
    return head, counts, in_prompt

"""Drawing a token of each row from its logits by temperature, min_p, top_k and top_p, without sorting the vocabulary.

A token is drawn from what min_p and top_k leave; while the tokens likelier than it already hold the share top_p, it is drawn again, from
those alone. What is taken in the end follows the truncated distribution exactly: this is rejection sampling, as in
flashinfer.ai/2025/03/10/sampling.html. Each turn is one read of the row, and there are fewer than 1 / top_p + 1 on average, however the
logits are distributed. Only top_k needs its threshold beforehand, because top_p asks for a share of what top_k leaves.

One turn is an exponential race: of waits with rates w, the i-th is the shortest with probability w_i / sum(w). It is run twice, among
CLASSES classes of tokens (token % CLASSES) by their sums, then among the members of the winner, so that a thousand random numbers serve a
vocabulary. They depend on (seed, position, turn) alone, so neighbours never matter.

Letters: B rows, V vocabulary, C classes, I members of a class, L running sums of a program.
"""

import math
from functools import partial, reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

CLASSES = 512
# A program adds up STACK * CLASSES running sums, AHEAD reads at a time, with so many warps: of seven combinations tried on an H200 the
# fastest at 256 rows of 151,936 tokens and among the fastest at one row, because two programs of 64 registers a thread share a core.
STACK, AHEAD, WARPS = 4, 4, 16
LOG2E = math.log2(math.e)
_LOWEST = float(jnp.finfo(jnp.float32).min)  # every finite logit reaches it, and minus infinity does not
_TINY = 2.0**-100  # a weight below it counts as none: the likeliest token has weight 1
_FEW = 8  # tokens too many that are worth dropping one by one
_DENORMAL = 0x7FFFFF  # the bits of the largest denormal
_HIGH_KEY = 0x7F800000 - _DENORMAL + 1  # above that of infinity


class Choice(NamedTuple):
    """How each row chooses: temperature 0 takes the likeliest. Off is: top_p 1, min_p 0, top_k 0."""

    temperature_B: Array
    top_p_B: Array
    min_p_B: Array
    top_k_B: Array
    seed_B: Array
    position_B: Array


@partial(jax.jit, static_argnames=("implementation", "interpret"))
def draw(logits_BV: Array, likeliest_B: Array, choice: Choice, *, implementation: str = "reference", interpret: bool = False) -> Array:
    """A token of each row, int32 [B]. `likeliest_B` are the tokens with the largest logits.

    Equals share their fate: top_k keeps every token equal to the k-th, top_p every token equal to the last one needed to reach its share
    of what min_p and top_k leave. The implementations draw the same token unless it hangs on how a sum was rounded. implementation: as
    `implementation_for` names it. interpret: run the kernel in its interpreter, slowly, on a CPU. Raises ValueError for another name.
    """
    if implementation not in ("reference", "portable", "sm90"):
        raise ValueError(f"implementation must be one of portable, sm90, reference, got {implementation!r}")
    if implementation == "reference":
        return _reference(logits_BV, likeliest_B, choice)
    return pl.pallas_call(
        partial(_kernel, vocabulary=logits_BV.shape[1]),
        grid=likeliest_B.shape,
        out_shape=jax.ShapeDtypeStruct(likeliest_B.shape, jnp.int32),
        compiler_params=plt.CompilerParams(num_warps=WARPS, num_stages=1),
        interpret=interpret,
        name="draw",
    )(logits_BV, likeliest_B, *choice)


# ---------------------------------------------------------------------- random numbers


def threefry(key: tuple[Array, Array], counter: tuple[Array, Array]) -> tuple[Array, Array]:
    """Threefry-2x32 with 20 rounds (Salmon et al. 2011, doi.org/10.1145/2063384.2063405), as jax.random has it; uint32, any shapes."""
    keys = (*key, key[0] ^ key[1] ^ jnp.uint32(0x1BD11BDA))
    x, y = counter[0] + keys[0], counter[1] + keys[1]
    for i in range(5):
        for turn in ((13, 15, 26, 6), (17, 29, 16, 24))[i % 2]:
            x = x + y
            y = x ^ (y << jnp.uint32(turn) | y >> jnp.uint32(32 - turn))
        x, y = x + keys[(i + 1) % 3], y + keys[(i + 2) % 3] + jnp.uint32(i + 1)
    return x, y


def waits(seed: Array, position: Array, turn: Array, index: Array) -> tuple[Array, Array]:
    """Two independent waiting times at rate 1, float32, of (seed, position, turn, index), which broadcast.

    All 32 random bits are used, and small waits, which win, are exact: a token a millionth as likely is drawn as often as it should be.
    """

    def wait(bits):
        uniform = (bits.astype(jnp.float32) + 0.5) * 2.0**-32
        return -jnp.log1p(-jnp.minimum(uniform, 1 - 2.0**-24))  # finite, so that one that runs alone still wins

    key, counter = (seed.astype(jnp.uint32), position.astype(jnp.uint32)), (turn.astype(jnp.uint32), index.astype(jnp.uint32))
    first, second = threefry(key, counter)
    return wait(first), wait(second)


# ---------------------------------------------------------------------- in plain jax.numpy


def _reference(logits_BV: Array, likeliest_B: Array, choice: Choice) -> Array:
    greedy_B = choice.temperature_B <= 0
    return lax.cond(greedy_B.all(), lambda: likeliest_B, lambda: _drawn(logits_BV, likeliest_B, choice, greedy_B))


def _drawn(logits_BV: Array, likeliest_B: Array, choice: Choice, greedy_B: Array) -> Array:
    temperature_B = jnp.where(greedy_B, 1.0, choice.temperature_B)
    peak_B = jnp.take_along_axis(logits_BV, likeliest_B[:, None], axis=1)[:, 0]
    floor_B = jnp.maximum(peak_B + temperature_B * jnp.log(choice.min_p_B), _LOWEST)
    floor_B = lax.cond((choice.top_k_B > 0).any(), partial(raise_to_kth, logits_BV, choice.top_k_B), lambda floor_B: floor_B, floor_B)
    weight_BV = _weight(logits_BV - peak_B[:, None], temperature_B[:, None])
    weight_BV = jnp.where(logits_BV >= floor_B[:, None], weight_BV, 0.0)
    token_B, mass_B = _race(weight_BV, choice, jnp.uint32(0))
    wanted_B = jnp.where((choice.top_p_B >= 1) | greedy_B, jnp.inf, jnp.maximum(choice.top_p_B * mass_B, _TINY))

    def again(state):
        turn, token_B, open_B = state
        drawn_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=1)
        next_B, above_B = _race(jnp.where(logits_BV > drawn_B, weight_BV, 0.0), choice, turn)
        open_B = open_B & (above_B >= wanted_B)
        return turn + 1, jnp.where(open_B, next_B, token_B), open_B

    _, token_B, _ = lax.while_loop(lambda state: state[2].any(), again, (jnp.uint32(1), token_B, wanted_B < jnp.inf))
    return jnp.where(greedy_B, likeliest_B, token_B)


def _weight(below: Array, temperature: Array) -> Array:
    """The weight of a token whose logit is `below` the largest (at most 0)."""
    weight = jnp.exp2(below * (LOG2E / temperature))
    return jnp.where(weight >= _TINY, weight, 0.0)


def _race(weight_BV: Array, choice: Choice, turn: Array) -> tuple[Array, Array]:
    """(token_B, mass_B): a token drawn by weight, and the sum of the weights."""
    rows, width = weight_BV.shape
    classes = min(CLASSES, width)
    members = -(-width // classes)
    weight_BIC = jnp.pad(weight_BV, ((0, 0), (0, members * classes - width))).reshape(rows, members, classes)
    seed_B1, position_B1 = choice.seed_B[:, None], choice.position_B[:, None]
    sum_BC = weight_BIC.sum(1)
    class_B = jnp.argmin(waits(seed_B1, position_B1, turn, jnp.arange(classes))[0] / sum_BC, axis=1)
    weight_BI = jnp.take_along_axis(weight_BIC, class_B[:, None, None], axis=2)[:, :, 0]
    member_B = jnp.argmin(waits(seed_B1, position_B1, turn, jnp.arange(members))[1] / weight_BI, axis=1)
    return jnp.minimum(member_B * classes + class_B, width - 1).astype(jnp.int32), sum_BC.sum(1)


def raise_to_kth(logits_BV: Array, k_B: Array, floor_B: Array) -> Array:
    """The larger of `floor_B` and the k-th largest logit, which is searched for bit by bit; floor_B where k is 0 or at least V."""
    key_BV = _key(logits_BV)

    def narrow(_, bounds):
        low_B, high_B = bounds
        middle_B = _middle(low_B, high_B)
        enough_B = (key_BV >= middle_B[:, None]).sum(1, dtype=jnp.int32) >= k_B
        return jnp.where(enough_B, middle_B, low_B), jnp.where(enough_B, high_B, middle_B)

    kth_B, _ = lax.fori_loop(0, 32, narrow, (jnp.full_like(k_B, -_HIGH_KEY), jnp.full_like(k_B, _HIGH_KEY)))
    return jnp.where((k_B > 0) & (k_B < logits_BV.shape[1]), jnp.maximum(floor_B, _float(kth_B)), floor_B)


def _key(x: Array) -> Array:
    """int32 keys that compare as the floats do. Neighbours differ by 1: denormals, which some compilers flush, count as 0."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    size = jnp.maximum((bits & 0x7FFFFFFF) - _DENORMAL, 0)
    return jnp.where(bits < 0, -size, size)


def _float(key: Array) -> Array:
    """The float whose key this is."""
    size = lax.bitcast_convert_type(jnp.where(key == 0, 0, jnp.abs(key) + _DENORMAL), jnp.float32)
    return jnp.where(key < 0, -size, size)


def _middle(low: Array, high: Array) -> Array:
    """Halfway between two int32, whose sum may not fit."""
    return (low >> 1) + (high >> 1) + (low & high & 1)


# ---------------------------------------------------------------------- as a Pallas-Triton kernel, a program a row


class Row(NamedTuple):
    """A row of logits in memory, and what its weights are relative to."""

    ref: jax.Ref
    row: Array
    width: int
    peak: Array
    temperature: Array

    def load(self, at: Array, **mask) -> Array:
        return plt.load(self.ref.at[self.row, at], **mask)

    def weight(self, x: Array) -> Array:
        return _weight(x - self.peak, self.temperature)


def _kernel(
    logits_ref, likeliest_ref, temperature_ref, top_p_ref, min_p_ref, top_k_ref, seed_ref, position_ref, token_ref, *, vocabulary: int
):
    row = pl.program_id(0)
    likeliest, temperature = plt.load(likeliest_ref.at[row]), plt.load(temperature_ref.at[row])
    plt.store(token_ref.at[row], likeliest)

    @pl.when(temperature > 0)
    def _():
        logits = Row(logits_ref, row, vocabulary, plt.load(logits_ref.at[row, likeliest]), temperature)
        noise = plt.load(seed_ref.at[row]), plt.load(position_ref.at[row])
        floor = jnp.maximum(logits.peak + temperature * jnp.log(plt.load(min_p_ref.at[row])), _LOWEST)
        plt.store(token_ref.at[row], _choose(logits, noise, floor, plt.load(top_k_ref.at[row]), plt.load(top_p_ref.at[row])))


def _choose(logits: Row, noise: tuple[Array, Array], floor: Array, k: Array, p: Array) -> Array:
    floor, sum_C = truncate(logits, floor, k)
    wanted = jnp.where(p >= 1, jnp.inf, jnp.maximum(p * jnp.sum(sum_C), _TINY))
    token = _run(logits, noise, jnp.uint32(0), sum_C, lambda x: x >= floor)

    def again(state):
        turn, token, _ = state
        drawn = logits.load(token)
        sum_C = _classes(_sums(logits, lambda x: x > drawn)[0])
        rejected = jnp.sum(sum_C) >= wanted
        after = jnp.where(rejected, _run(logits, noise, turn, sum_C, lambda x: x > drawn), token)
        return turn + 1, after, rejected

    return lax.while_loop(lambda state: state[2], again, (jnp.uint32(1), token, wanted < jnp.inf))[1]


def _sums(logits: Row, within, gather=None):
    """(weight, number, extreme), each [STACK, CLASSES]: sums over the tokens `within`, and `gather` (maximum, minimum) of their logits."""
    at_L = jnp.arange(STACK)[:, None] * CLASSES + jnp.arange(CLASSES)[None, :]
    size, none = STACK * CLASSES, jnp.inf if gather is jnp.minimum else -jnp.inf

    def add(sums, x_L):
        in_L = within(x_L)
        weight_L, number_L, extreme_L = sums
        weight_L += jnp.where(in_L, logits.weight(x_L), 0.0)
        if gather is not None:
            number_L, extreme_L = number_L + in_L.astype(jnp.int32), gather(extreme_L, jnp.where(in_L, x_L, none))
        return weight_L, number_L, extreme_L

    def turn(i, sums):
        loaded = [logits.load((i * AHEAD + j) * size + at_L) for j in range(AHEAD)]
        return reduce(add, loaded, sums)

    sums = tuple(jnp.full(at_L.shape, value, dtype) for value, dtype in ((0, jnp.float32), (0, jnp.int32), (none, jnp.float32)))
    sums = lax.fori_loop(0, logits.width // (AHEAD * size), turn, sums)
    for start in range(logits.width // (AHEAD * size) * AHEAD * size, logits.width, size):
        place_L = start + at_L
        sums = add(sums, logits.load(place_L, mask=place_L < logits.width, other=-jnp.inf))
    return sums


def _classes(weight_L: Array) -> Array:
    return jnp.sum(weight_L, axis=0)


def _run(logits: Row, noise: tuple[Array, Array], turn: Array, sum_C: Array, within) -> Array:
    """The token that wins the race among those `within`, whose classes weigh `sum_C`."""
    chosen = jnp.argmin(waits(*noise, turn, jnp.arange(CLASSES))[0] / sum_C, axis=0).astype(jnp.int32)
    member_I = jnp.arange(pl.next_power_of_2(-(-logits.width // CLASSES)))
    place_I = member_I * CLASSES + chosen
    x_I = logits.load(place_I, mask=place_I < logits.width, other=-jnp.inf)
    weight_I = jnp.where(within(x_I), logits.weight(x_I), 0.0)
    member = jnp.argmin(waits(*noise, turn, member_I)[1] / weight_I, axis=0).astype(jnp.int32)
    return jnp.minimum(member * CLASSES + chosen, logits.width - 1)


def truncate(logits: Row, floor: Array, k: Array) -> tuple[Array, Array]:
    """(floor, the classes' weights above it) after the floor was raised to leave k tokens, more where the k-th has equals; k 0 leaves all.

    Among STACK * CLASSES lanes the k likeliest tokens rarely share one, so the k-th largest of the lanes' maxima leaves little more than k
    tokens, and dropping as many of the lanes' minima as are too many leaves k. These are guesses; counting decides.
    """
    weight_L, number_L, high_L = _sums(logits, lambda x: x >= floor, jnp.maximum)
    number = jnp.sum(number_L)
    k = jnp.where(k > 0, jnp.minimum(k, number), number)
    # At least k tokens reach `low`, `number` of them; fewer reach `high`.
    low, high = _key(floor), jnp.int32(_HIGH_KEY)
    guess = _kth(high_L, jnp.where(number > k, k, 0))
    guess = jnp.where((guess > low) & (guess < high), guess, _middle(low, high))

    def narrow(state):
        low, high, number, guess, weight_L = state
        guessed_L, number_L, low_L = _sums(logits, lambda x: x >= _float(guess), jnp.minimum)
        found = jnp.sum(number_L)
        enough = found >= k
        low = jnp.where(enough, jnp.maximum(guess, jnp.min(_key(low_L))), low)  # a logit there is, which leaves as many as the guess
        high, number = jnp.where(enough, high, guess), jnp.where(enough, found, number)
        after = jnp.where(enough, _kth(low_L, STACK * CLASSES - (number - k)), _middle(low, high))
        # A guess that hides behind an equal, or missed by little: is it the lowest that is the k-th?
        after = jnp.where((after <= low) | ~enough & (number - k <= _FEW), low + 1, after)
        return low, high, number, jnp.where(after < high, after, _middle(low, high)), jnp.where(enough, guessed_L, weight_L)

    state = low, high, number, guess, weight_L
    low, _, _, _, weight_L = lax.while_loop(lambda s: (s[2] > k) & (_middle(s[0], s[1]) > s[0]), narrow, state)
    return _float(low), _classes(weight_L)


def _kth(x_L: Array, k: Array) -> Array:
    """A key that k of the numbers reach, or, as there are equals, the largest that more do; a low one for k < 1."""
    key_L = _key(x_L)

    def narrow(state):
        low, high, number = state
        middle = _middle(low, high)
        found = jnp.sum((key_L >= middle).astype(jnp.int32))
        return jnp.where(found >= k, middle, low), jnp.where(found >= k, high, middle), jnp.where(found >= k, found, number)

    start = jnp.int32(-_HIGH_KEY), jnp.int32(_HIGH_KEY), jnp.where(k > 0, jnp.int32(x_L.size), k)
    return lax.while_loop(lambda s: (s[2] > k) & (_middle(s[0], s[1]) > s[0]), narrow, start)[0]

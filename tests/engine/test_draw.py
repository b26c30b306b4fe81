"""Drawing a token: the inverse of the running sum of the probabilities, in three levels of blocks.

The fourth number chooses among devices, of which there is one here.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.sampling import BLOCK, BLOCKS, best_token, invert, pick

pytestmark = pytest.mark.usefixtures("quick_compilation")


def brute(weights: np.ndarray, numbers: np.ndarray) -> tuple[int, float]:
    """The token in float64, and how near (relative to a level's sum) a number was to the border of two choices."""
    blocks = np.pad(weights, (0, -len(weights) % (BLOCKS * BLOCK))).reshape(-1, BLOCKS, BLOCK)
    place, nearest = (), 1.0
    for number in numbers.astype(np.float64):
        sums = blocks[place].reshape(len(blocks[place]), -1).sum(1)
        upto = np.cumsum(sums)
        nearest = min(nearest, np.abs(upto / upto[-1] - number).min())
        place = (*place, int(np.searchsorted(upto, number * upto[-1], side="right")))
    return int(np.ravel_multi_index(place, blocks.shape)), nearest


@pytest.mark.parametrize("size", [5, 4096, 9001])
def test_equals_three_sums_in_float64(size: int) -> None:
    rng = np.random.default_rng(size)
    logits = (3 * rng.normal(size=(60, size))).astype(np.float32)
    logits[rng.random(logits.shape) < 0.3] = -np.inf
    numbers = rng.random((60, 4)).astype(np.float32)
    got = np.asarray(jax.jit(lambda x, u: invert(x, jnp.exp, u))(logits, numbers))
    wanted = [brute(np.exp(row.astype(np.float64)), u[:3]) for row, u in zip(logits, numbers, strict=True)]
    certain = [near > 1e-5 for _, near in wanted]
    assert sum(certain) > 50
    assert got[certain].tolist() == [token for (token, _), sure in zip(wanted, certain, strict=True) if sure]
    assert np.isfinite(logits[np.arange(60), got]).all()


@pytest.mark.parametrize("size", [5, 4096, 9001])
def test_the_ends_of_the_interval_are_the_ends_of_the_support(size: int) -> None:
    weights = np.zeros((1, size), np.float32)
    first, last = size // 3, size - 2
    weights[0, [first, last]] = 1e-30, 1e30
    assert invert(jnp.asarray(weights), lambda x: x, jnp.zeros((1, 4))).tolist() == [first]
    assert invert(jnp.asarray(weights), lambda x: x, jnp.full((1, 4), 1 - 2**-24)).tolist() == [last]


def test_many_tokens_are_drawn_as_often_as_they_should_be() -> None:
    count, size = 4000, 9001
    logits = np.random.default_rng(0).normal(size=size).astype(np.float32) * 2
    numbers = jax.random.uniform(jax.random.key(1), (count, 4))
    tokens = invert(jnp.tile(logits, (count, 1)), jnp.exp, numbers)
    share = np.exp(logits.astype(np.float64))
    share /= share.sum()
    group = np.random.default_rng(2).integers(0, 12, size)  # of tokens from all blocks
    wanted = np.bincount(group, share, 12)
    got = np.bincount(group[np.asarray(tokens)], minlength=12) / count
    np.testing.assert_array_less(np.abs(got - wanted), 4.5 * np.sqrt(wanted / count))


def test_a_weight_of_zero_is_never_picked() -> None:
    weights = jnp.array([[0.0, 1.0, 0.0, 2.0, 0.0]] * 4 + [[0.0] * 5])
    assert pick(weights, jnp.array([0.0, 0.33, 0.34, 1.0, 0.5])).tolist() == [1, 1, 3, 3, 0]


def test_the_best_token_is_the_first_of_equals() -> None:
    logits = jnp.array([[1.0, 3.0, 3.0], [-jnp.inf] * 3, [0.0, -1.0, 0.0]])
    assert best_token(logits).tolist() == jnp.argmax(logits, axis=1).tolist() == [1, 0, 0]

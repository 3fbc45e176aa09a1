"""What both operations refuse, and how they say it."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import chunk_scores, gather_attention

Q, K = jnp.zeros((2, 3, 4)), jnp.zeros((5, 4))


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((Q[0], K), {}, "query [B, T, M] and keys [C, M], got (3, 4) and (5, 4)"),
        ((Q, K[0]), {}, "got (2, 3, 4) and (4,)"),
        ((Q, jnp.zeros((5, 3))), {}, "got (2, 3, 4) and (5, 3)"),
        ((Q, K.astype(jnp.int8)), {}, "int8 keys need key_scale [C]"),
        ((Q.astype(jnp.int8), K), {}, "int8 query needs query_scale [B, T] and int8 keys, got float32 keys"),
        ((Q, K), {"query_scale": jnp.ones(3)}, "query_scale must be [B, T] = (2, 3), got (3,)"),
        ((Q, K), {"key_scale": jnp.ones(4)}, "key_scale must be [C] = (5,), got (4,)"),
        ((Q, K), {"query_mask": jnp.ones((2, 4), bool)}, "bool [B, T] = (2, 3), got bool (2, 4)"),
        ((Q, K), {"query_mask": jnp.ones((2, 3))}, "bool [B, T] = (2, 3), got float32 (2, 3)"),
        ((Q, K), {"implementation": "cuda"}, "None or one of ('xla', 'tpu', 'gpu'), got 'cuda'"),
    ],
)
def test_chunk_scores_says_what_is_wrong(args, kwargs, message):
    with pytest.raises(ValueError) as error:
        chunk_scores(*args, **kwargs)
    assert str(error.value).startswith("chunk_scores: ") and message in str(error.value)


RANGES = np.zeros((2, 3), np.int32)


INT8 = dict.fromkeys(("bank_k", "bank_v"), jnp.zeros((13, 2, 5), jnp.int8)) | dict(bank_v_scale=jnp.ones((2, 13)))


def wrong(**changes):
    """Arguments with B 2, T 3, S 5, H 4, K 2, D 5, C 13, k 3, all of which fit but for `changes`."""
    own, bank = jnp.zeros((2, 5, 2, 5)), jnp.zeros((13, 2, 5))
    fits = dict(q=jnp.zeros((2, 3, 4, 5)), k=own, v=own, bank_k=bank, bank_v=bank, bias=jnp.zeros((2, 3, 4)))
    return fits | dict(starts=RANGES, lengths=RANGES, mask=np.ones((2, 5), bool)) | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(q=jnp.zeros((3, 4, 5))), "need q [B, T, H, D], k, v [B, S, K, D], got (3, 4, 5), "),
        (dict(q=jnp.zeros((3, 3, 4, 5))), "got (3, 3, 4, 5), (2, 5, 2, 5)"),
        (dict(q=jnp.zeros((2, 3, 4, 4))), "got (2, 3, 4, 4), (2, 5, 2, 5)"),
        (dict(v=jnp.zeros((2, 4, 2, 5))), "(2, 5, 2, 5), (2, 4, 2, 5)"),
        (dict(q=jnp.zeros((2, 3, 3, 5))), "H a multiple of K and S >= T or S = 0, got H 3, K 2, S 5, T 3"),
        (dict(q=jnp.zeros((2, 6, 4, 5))), "H a multiple of K and S >= T or S = 0, got H 4, K 2, S 5, T 6"),
        (dict(bank_k=jnp.zeros((13, 1, 5))), "[C, K, D] with K 2, D 5, got (13, 1, 5), (13, 2, 5)"),
        (dict(bank_v=jnp.zeros((12, 2, 5))), "got (13, 2, 5), (12, 2, 5)"),
        (dict(bank_k=jnp.zeros((13, 3, 5)), bank_v=jnp.zeros((13, 3, 5))), "got (13, 3, 5), (13, 3, 5)"),
        (dict(bank_k=jnp.zeros((13, 2, 5), jnp.int8)), "one dtype, and bank_k_scale, bank_v_scale if it is int8"),
        (dict(bank_k_scale=jnp.ones((2, 13))), "if it is int8 and only then; got float32, float32"),
        (INT8 | dict(bank_k_scale=jnp.ones((13, 2))), "must be [K, C] = (2, 13), got (13, 2), (2, 13)"),
        (dict(starts=RANGES[:, :2]), "[B, k] with B 2, got (2, 2), (2, 3)"),
        (dict(starts=RANGES[:, 0], lengths=RANGES[:, 0]), "got (2,), (2,)"),
        (dict(bias=jnp.zeros((2, 3, 2))), "bias must be [B, k, H] = (2, 3, 4), got (2, 3, 2)"),
        (dict(mask=np.ones((2, 3), bool)), "bool [B, S] = (2, 5), got bool (2, 3)"),
        (dict(mask=jnp.ones((2, 5))), "bool [B, S] = (2, 5), got float32 (2, 5)"),
        (dict(implementation="triton"), "None or one of ('xla', 'tpu', 'gpu'), got 'triton'"),
    ],
)
def test_gather_attention_says_what_is_wrong(changes, message):
    with pytest.raises(ValueError) as error:
        gather_attention(**wrong(**changes))
    assert str(error.value).startswith("gather_attention: ") and message in str(error.value)


@pytest.mark.parametrize("implementation", ["tpu", "gpu"])
@pytest.mark.parametrize("op", ["chunk_scores", "gather_attention"])
def test_a_kernel_asked_for_by_name_never_falls_back(op, implementation):
    call = {
        "chunk_scores": lambda **kwargs: chunk_scores(Q, K, **kwargs),
        "gather_attention": lambda **kwargs: gather_attention(**wrong(**kwargs))[0],
    }[op]
    with pytest.raises(NotImplementedError, match=f"{op}: the '{implementation}' kernel does not run on cpu"):
        call(implementation=implementation)
    np.testing.assert_array_equal(call(implementation="xla"), call())

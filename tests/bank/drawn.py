"""Banks of documents whose chunks are drawn from their text, so that any test can say what must be where."""

import zlib

import numpy as np

from msa_jax.bank.change import Encoded
from msa_jax.bank.manifest import BankSpec
from msa_jax.bank.reader import ARRAYS
from msa_jax.bank.store import MemoryStore
from msa_jax.bank.table import BankDocument
from msa_jax.data.templates import Template
from tests.bank.test_bank_encoder import V, model_of

L, M, K, D = 2, 12, 2, 6


class Bytes:
    """A tokenizer of bytes, with plain numbers of three digits; enough of one to frame documents."""

    template = Template(document="<{id}. {text}{id}>", id_digits=3)
    max_number_len = 5
    document_fingerprint = "bytes"

    def encode(self, text):
        return [byte % V for byte in text.encode()]

    encode_frame = encode

    def encode_batch(self, texts):
        return [self.encode(text) for text in texts]

    def number_ids(self, number):
        return self.encode(f"[{number}]")

    def token_id(self, token):
        return 0


def rendered(text, number):
    """Tokens of a document as it is encoded, told without the code that frames it."""
    return Bytes().encode(f"<[{number}]. {text}[{number}]>")


def create(path):
    return MemoryStore.create(path, BankSpec.of(model_of(), Bytes()))


def chunks_of(text):
    """[L, n, ...] by name; n is the number that the text ends in, or 1 to 5."""
    seed = zlib.crc32(text.encode())
    digits = text[len(text.rstrip("0123456789")) :]
    rng, n = np.random.default_rng(seed), int(digits) if digits else 1 + seed % 5
    keys = rng.standard_normal((L, n, K, D))
    keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
    content = rng.standard_normal((2, L, n, K, D))
    return dict(zip(ARRAYS, (keys.reshape(L, n, M).astype("f4"), *content.astype("f4")), strict=True))


def put(store, texts, namespace="default", *, replace=False):
    """Commit documents {id: text}; texts that the namespace holds are not written again, nor numbered."""
    documents = [BankDocument(identity, text, namespace=namespace) for identity, text in texts.items()]
    new, sources = [], []
    for document in documents:
        row = store.table.row_with(document.text_key)
        if row is None and document.text not in new:
            new.append(document.text)
        sources.append(new.index(document.text) if row is None else -1 - row)
    drawn = [chunks_of(text) for text in new]
    lengths = np.array([d["content_k"].shape[1] for d in drawn], np.int64)
    arrays = [np.concatenate([np.zeros((L, 0, *rest), "f4"), *(d[name] for d in drawn)], axis=1)
              for name, rest in zip(ARRAYS, ((M,), (K, D), (K, D)), strict=True)]  # fmt: skip
    ordinals = store.manifest.next_text + np.arange(len(new))
    encoded = Encoded(*arrays, lengths, lengths * 4, ordinals, ordinals)
    (store.replace if replace else store.append)(documents, encoded, sources)

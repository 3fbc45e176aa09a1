"""One of several processes that load a bank over the devices of all: python -m tests.bank.mesh_process PATH PORT I N.

Prints as JSON which chunks it read for which of its parts, and the rows that the question's documents have.
"""

import json
import sys

import jax
import numpy as np
from flax import nnx

from msa_jax.bank import transfer
from msa_jax.bank.loading import load
from msa_jax.bank.store import MemoryStore
from msa_jax.sharding import MeshConfig
from tests.bank.test_bank_encoder import B, _forward, model_of


def main(path, port, number, count):
    jax.distributed.initialize(f"localhost:{port}", int(count), int(number))
    read, real = [], transfer.read_piece
    transfer.read_piece = lambda a, piece, s: read.append([piece.part.chunks, piece.chunks]) or real(a, piece, s)
    mesh = MeshConfig(memory=jax.device_count()).make()
    with MemoryStore(path, version=3) as store:
        loaded = load(store, mesh=mesh, room=3.0)
    with MemoryStore(path, version=4) as store:
        loaded = loaded.refresh(store)
    graphdef, params = nnx.split(model_of())
    with jax.set_mesh(mesh):
        output = _forward(graphdef, jax.device_get(params), loaded.bank, loaded.visible([None] * B))
        whole = jax.jit(lambda x: x, out_shardings=jax.NamedSharding(mesh, jax.P()))
        hidden, documents = jax.device_get(whole((output.hidden, output.selection.documents)))
    held = [shard.index[1].indices(loaded.bank.num_chunks)[:2] for shard in loaded.bank.content_k.addressable_shards]
    rows = loaded.rows[documents]
    print(json.dumps(dict(read=read, held=held, rows=rows.tolist(), hidden=np.asarray(hidden, float).tolist())))


if __name__ == "__main__":
    main(*sys.argv[1:])

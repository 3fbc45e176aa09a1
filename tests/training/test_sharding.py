"""Training on meshes: the same numbers as one device, and nothing crosses devices that need not."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from benchmarks.collectives import collectives, compile_encode, compile_step, small_config
from msa_jax.errors import ConfigError
from msa_jax.runs.build import make_mesh
from msa_jax.runs.config import RunConfig
from msa_jax.sharding import MeshConfig

HERE = pathlib.Path(__file__).resolve().parent


def compared(*meshes):
    """What mesh_worker.py prints: the largest differences from one device, of each mesh of 8 devices."""
    xla = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"  # its time is compilation
    env = os.environ | {
        "PYTHONPATH": str(HERE.parents[1]),
        "XLA_FLAGS": f"{xla} --xla_llvm_disable_expensive_passes=true",
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
    }
    command = [sys.executable, str(HERE / "mesh_worker.py"), *meshes]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr
    assert "Involuntary full rematerialization" not in done.stderr, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def assert_as_one_device(*meshes):
    *rows, refused = compared(*meshes)
    assert [row["mesh"] for row in rows] == list(meshes)
    for row in rows:
        assert row["same_documents"], row
        assert max(row[name] for name in ("loss", "metrics", "hidden", "gradients", "start")) < 1e-5, row
        # No device has more than its part of any matrix, the embedding included; and what the optimiser keeps of
        # each of the 26 parameters lies as the parameter does.
        data, memory, model, fsdp = map(int, row["mesh"].split(","))
        assert row["largest_part"] == 1 / (model * (data * memory if fsdp else 1)), row
        assert row["optimizer_follows"] > 40, row
    assert refused == {"refused": "16 documents in 16 rows cannot be packed in 3 equal parts"}


def test_training_on_a_mesh_is_training_on_one_device():
    assert_as_one_device("2,2,2,1")


@pytest.mark.slow
def test_training_on_every_mesh_is_training_on_one_device():
    meshes = ("8,1,1", "2,4,1", "1,8,1", "2,2,2", "4,1,2")
    assert_as_one_device(*(f"{mesh},{fsdp}" for mesh in meshes for fsdp in (0, 1)))


def test_what_crosses_devices_does_not_grow_with_the_documents():
    config = small_config(num_layers=1, router_layers=(0,))
    mesh, questions = MeshConfig(data=2), 6
    assert collectives(compile_encode(config, mesh, 32)) == []
    assert collectives(compile_encode(config, MeshConfig(memory=2), 32)) == []
    few, many = (
        collectives(compile_step(config, mesh, documents, questions=questions, tokens=9)) for documents in (32, 64)
    )
    assert [(c.op, c.source, c.times) for c in few] == [(c.op, c.source, c.times) for c in many]
    grown = [(b.nbytes - a.nbytes, b.source) for a, b in zip(few, many, strict=True) if a.nbytes != b.nbytes]
    # The scores [B, N] of a layer in float32, once for every recall@n that is logged.
    assert [growth for growth, _ in grown] == [questions * 32 * 4] * 4, grown
    assert sum(c.nbytes * c.times for c in few) > 10_000  # gradients of the parameters, so something was read


@pytest.mark.parametrize(
    "mesh, model, data, statement",
    [
        ({"data": 3}, {}, {}, "a mesh of data 3, memory 1, model 1 does not make up 2 devices: choose sizes whose"),
        ({"memory": 2}, {}, {"num_documents": 17}, "data.num_documents 17 cannot be spread over 2 devices .* 18 can"),
        ({"data": 2}, {}, {"num_questions": 7}, "data.num_questions 7 cannot be spread over 2 devices .* 8 can"),
        ({"model": 2}, {"num_kv_heads": 1}, {}, "mesh.model 2 does not divide num_kv_heads 1: choose a divisor"),
        ({"model": 2}, {"mlp_size": 33}, {}, "mesh.model 2 does not divide mlp_size 33: choose a divisor"),
        ({"modle": 2}, {}, {}, "modle"),
        ({"memory": 0}, {}, {}, "mesh.memory must be an integer of at least 1, got 0"),
    ],
)
def test_a_mesh_that_does_not_fit_is_a_sentence(mesh, model, data, statement):
    with pytest.raises(ConfigError, match=statement):
        make_mesh(
            RunConfig.from_dict(
                {
                    "model": {"preset": "tiny"} | model,
                    "data": data,
                    "training": {"phases": [{"steps": 1}]},
                    "mesh": mesh,
                }
            )
        )

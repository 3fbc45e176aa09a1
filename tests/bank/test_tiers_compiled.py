"""The 4B model's question step with content off the device, compiled for TPUs that are not here (`make tpu`)."""

import os

import pytest

# Before libtpu is loaded: there is no metadata server to ask, and other processes may compile as well.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax  # noqa: E402

from benchmarks import compiled as programs  # noqa: E402
from benchmarks import tiers_compiled  # noqa: E402
from msa_jax.cli.compilation import for_other_chips

MIB = 2**20
CHUNKS = 262_144
missing = programs.available("v5p")
pytestmark = [pytest.mark.usefixtures("optimised"), pytest.mark.skipif(missing is not None, reason=str(missing))]


def compiled(**changes):
    case = tiers_compiled.Case(**dict(tier="host", chunks=CHUNKS) | changes)
    function, args = tiers_compiled.program(case, "v5p")
    with for_other_chips(), jax.set_mesh(programs.mesh_of("v5p")):
        return jax.jit(function).lower(**args).compile()


@pytest.mark.parametrize(("tier", "content"), [("host", "int8"), ("disk", "bfloat16")])
def test_a_question_moves_no_layer_of_content(tier, content):
    executable = compiled(tier=tier, content=content)
    stats, text = executable.memory_analysis(), executable.as_text()
    size = 18 * CHUNKS * 1024 * 2 * (1 if content == "int8" else 2)
    assert stats.host_argument_size_in_bytes == (size if tier == "host" else 0)
    assert stats.host_temp_size_in_bytes == 0
    # A layer of content, K alone, is 256 MiB or twice that.
    assert stats.temp_size_in_bytes < 128 * MIB
    # Routing and attention are the kernels, as with content on the device.
    assert text.count('custom_call_target="tpu_custom_call"') == 2
    # Copies by the device out of host memory (space 5): two for each of 16 documents; nothing is computed there.
    copies = [line for line in text.splitlines() if " dynamic-slice-start(" in line and "S(5)}" in line]
    assert len(copies) == (32 if tier == "host" else 0)
    assert "HostExecute" not in text


def test_what_is_fetched_for_decoding_is_of_the_selected_documents_alone():
    stats = compiled(step="fetch").memory_analysis()
    selected = 18 * 16 * tiers_compiled.LONGEST * 1024 * 2 * 2
    assert selected <= stats.output_size_in_bytes < selected + MIB
    assert stats.temp_size_in_bytes < 8 * MIB
